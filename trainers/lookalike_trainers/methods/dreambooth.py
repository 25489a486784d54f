"""DreamBooth (Ruiz et al. 2023): the whole denoiser learns the subject, under a rare word.

    min_theta  E || e - e_theta(x_t, t, c("a {identifier} {class noun}")) ||^2
     + lambda  E || e - e_theta(x'_t, t', c("a {class noun}")) ||^2           (eq. 2)

x: photos; x': class images, drawn by the frozen base or given by the user. Both terms are one batch
and one forward (data.py, objective.py). Optionally the text encoders train too.

What is kept is trained - base for every weight, in float32: added to the base it gives the trained
weights again, to a rounding of the last bit. SD 1.5's 860 million take 3.4 GB; float16 would take
half and round more.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_registry.tensor_file import ADAPTER_NAME, save_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients, trainable
from lookalike_trainers.method_configs import DreamBoothConfig
from lookalike_trainers.methods.deltas import differences, named, parts_of, wear_deltas
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.objective import weighted_mse

NAME = "dreambooth"


class DreamBooth:
    """The method, holding a base's UNet, and its text encoders where they train, thawed."""

    def __init__(self, parts: Any, config: DreamBoothConfig) -> None:
        self.config = config
        self.base_folder: Path = parts.folder
        unet = parts.take("unet").requires_grad_(True)
        text_encoders = parts.take("text_encoders") if config.train_text_encoder else []
        thaw(text_encoders)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet, text_encoders, bf16=config.mixed_precision == "bf16", silent=parts.silent_ids()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        text = trainable(self.module.text_encoders)
        return parameter_groups(self.config, unet=trainable(self.module.unet), text=text)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        base = BaseParts(self.base_folder, torch.device("cpu"))
        tensors: dict[str, torch.Tensor] = {}
        for part, model in parts_of(self.module).items():
            trained = {n: p for n, p in named(model).items() if p.requires_grad}
            own = named(base.unet if part == "unet" else parts_of(base)[part])
            tensors |= differences(
                {f"{part}.{name}": p for name, p in trained.items()},
                {f"{part}.{name}": own[name] for name in trained},
            )
        save_tensors(path, NAME, tensors, {}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> DreamBooth:
    assert isinstance(config, DreamBoothConfig)
    return DreamBooth(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W_base + scale * (W_trained - W_base)."""
    from safetensors.torch import load_file

    return wear_deltas(wearer, load_file(file), scale)


def thaw(text_encoders: list[Any]) -> None:
    """Let encoders train, but for what SDXL's first computes and nobody reads (its last layer)."""
    for encoder in text_encoders:
        encoder.requires_grad_(True)
    if len(text_encoders) > 1:
        first = getattr(text_encoders[0], "text_model", text_encoders[0])
        unread: list[nn.Module] = [first.encoder.layers[-1], first.final_layer_norm]
        for module in unread:
            module.requires_grad_(False)
