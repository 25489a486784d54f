"""LoRA (Hu et al. 2021): every targeted W of the denoiser learns a product of two thin matrices.

    W' = W + (alpha / rank) B A,    A: [rank, in], B: [out, rank] = 0 at the start

Optionally the text encoder's attention too. With a prior term it is DreamBooth-LoRA.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.adapter_file import LoraCard, LoraShape, save_lora
from lookalike_trainers.config import LoraConfig, TrainingConfig
from lookalike_trainers.methods.method import Card
from lookalike_trainers.objective import weighted_mse

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Denoiser(nn.Module):
    """UNet, and the text encoder where it trains, under one forward."""

    def __init__(self, unet: Any, text_encoder: Any | None, bf16: bool) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.bf16 = bf16

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16):
            features = text if self.text_encoder is None else self.text_encoder(text)[0]
            predicted: torch.Tensor = self.unet(noisy, timesteps, features, return_dict=False)[0]
        return predicted


class Lora:
    """The method, holding a base's UNet with adapters in it."""

    def __init__(self, parts: Any, config: LoraConfig) -> None:
        self.config = config
        self.alpha = config.alpha if config.alpha is not None else float(config.rank)
        self.wants_ids = config.train_text_encoder

        unet = parts.take("unet")
        _insert(unet, config.targets, config.rank, self.alpha)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        text_encoder = None
        if config.train_text_encoder:
            text_encoder = parts.take("text_encoder")
            _insert(text_encoder, TEXT_ATTENTION, config.rank, self.alpha)
            if config.gradient_checkpointing:
                text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        bf16 = config.mixed_precision == "bf16"
        self.module = Denoiser(unet, text_encoder, bf16).train()
        if bf16:
            # Autocast would round the frozen weights anew in every step; the trained ones and
            # their optimiser's state stay in float32.
            for parameter in self.module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": _trainable(self.module.unet), "lr": self.config.learning_rate}]
        if self.module.text_encoder is not None:
            groups.append(
                {
                    "params": _trainable(self.module.text_encoder),
                    "lr": self.config.text_encoder_learning_rate,
                }
            )
        return groups

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return weighted_mse(prediction, target, weight)

    def save(self, path: Path, card: Card) -> str:
        text_encoder = self.module.text_encoder
        return save_lora(
            path,
            _state(self.module.unet),
            None if text_encoder is None else _state(text_encoder),
            LoraCard(
                **vars(card),
                unet=self._shape(self.config.targets),
                text_encoder=None if text_encoder is None else self._shape(TEXT_ATTENTION),
            ),
        )

    def _shape(self, targets: tuple[str, ...]) -> LoraShape:
        return LoraShape(rank=self.config.rank, alpha=self.alpha, targets=targets)


def build(parts: Any, config: TrainingConfig) -> Lora:
    assert isinstance(config, LoraConfig)
    return Lora(parts, config)


def _insert(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> None:
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


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    import peft

    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}
