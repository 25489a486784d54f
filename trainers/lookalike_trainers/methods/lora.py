"""LoRA (Hu et al. 2021): every targeted W of the denoiser learns a product of two thin matrices.

    W' = W + (alpha / rank) B A,    A: [rank, in], B: [out, rank] = 0 at the start

Optionally the text encoders' attention too. With a prior term it is DreamBooth-LoRA.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard, LoraShape, save_lora
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.config import LoraConfig, TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients, trainable
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.objective import weighted_mse

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Lora:
    """The method, holding a base's UNet with adapters in it."""

    def __init__(self, parts: Any, config: LoraConfig) -> None:
        assert config.resolution is not None
        self.config = config
        self.alpha = config.alpha if config.alpha is not None else float(config.rank)
        unet = parts.take("unet")
        insert(unet, config.targets, config.rank, self.alpha)
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        if config.train_text_encoder:
            for encoder in text_encoders:
                insert(encoder, TEXT_ATTENTION, config.rank, self.alpha)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet,
            text_encoders,
            resolution=config.resolution,
            bf16=config.mixed_precision == "bf16",
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": trainable(self.module.unet), "lr": self.config.learning_rate}]
        text = trainable(self.module.text_encoders)
        if text:
            groups.append({"params": text, "lr": self.config.text_encoder_learning_rate})
        return groups

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / WEIGHTS_NAME
        text = self.module.text_encoders[0] if self.config.train_text_encoder else None
        save_lora(
            path,
            state(self.module.unet),
            None if text is None else state(text),
            LoraCard(
                **vars(card),
                unet=self._shape(self.config.targets),
                text_encoder=None if text is None else self._shape(TEXT_ATTENTION),
            ),
        )
        return path

    def _shape(self, targets: tuple[str, ...]) -> LoraShape:
        return LoraShape(rank=self.config.rank, alpha=self.alpha, targets=targets)


def build(parts: Any, config: TrainingConfig) -> Lora:
    assert isinstance(config, LoraConfig)
    return Lora(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """Let the file's products act beside those of other LoRAs worn already."""
    import peft
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from safetensors.torch import load_file

    tensors = load_file(file)
    scaled = {
        key: tensor * scale if key.endswith(".up.weight") else tensor
        for key, tensor in tensors.items()
    }
    known: dict[str, Any] = getattr(wearer.unet, "peft_config", {})
    common: dict[str, Any] = {
        "network_alphas": None,
        "adapter_name": f"worn_{len(known)}",
        "metadata": json.loads(read_header(file).metadata["lora_adapter_metadata"]),
    }
    touched = [wearer.unet]
    Loader.load_lora_into_unet(scaled, unet=wearer.unet, **common)
    for place, encoder in enumerate(wearer.text_encoders):
        prefix = "text_encoder" if place == 0 else f"text_encoder_{place + 1}"
        if any(key.startswith(f"{prefix}.") for key in scaled):
            Loader.load_lora_into_text_encoder(
                scaled, text_encoder=encoder, prefix=prefix, **common
            )
            touched.append(encoder)
    for model in touched:
        _activate_all(model)

    def take_off() -> None:
        for model in touched:
            for layer in model.modules():
                if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                    layer.delete_adapter(common["adapter_name"])
            model.peft_config.pop(common["adapter_name"], None)
            _activate_all(model)

    return take_off


def insert(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> None:
    """Put PEFT's LoRA layers into a frozen model; nothing else of it will train."""
    import peft

    model.requires_grad_(False)
    lora = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True
    )
    try:
        peft.inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise InvalidRequest(
            f"This base has no layers to put LoRA into under {', '.join(targets)}.",
            [FieldProblem("config.targets", str(error))],
        ) from error


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The products' matrices by PEFT's names, on the CPU."""
    import peft

    tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}


def _activate_all(model: Any) -> None:
    import peft

    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.set_adapter([name for name in model.peft_config if name in layer.lora_A])
