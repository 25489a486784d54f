"""Families of base models: which diffusers folders we can train on and sample from.

A family is recognised by the configuration of its parts. To support another one, describe it here
and teach the trainer and the sampler its text encoders and denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class UNetConfig(_Config):
    sample_size: int = Field(gt=0)
    in_channels: int = 4
    cross_attention_dim: int = 1280


class VaeConfig(_Config):
    block_out_channels: tuple[int, ...] = Field(min_length=1)
    latent_channels: int = 4


class TextEncoderConfig(_Config):
    """The defaults are those of transformers' CLIPTextConfig, which older files leave out."""

    hidden_size: int = 512
    hidden_act: str = "quick_gelu"
    max_position_embeddings: int = 77


class SchedulerConfig(_Config):
    prediction_type: str = "epsilon"


@dataclass(frozen=True)
class Parts:
    """What a family is recognised by. `classes`: component → class name, of those present."""

    classes: dict[str, str]
    unet: UNetConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    scheduler: SchedulerConfig


@dataclass(frozen=True)
class Family:
    name: str
    summary: str
    matches: Callable[[Parts], bool]


CLASSES = {
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""The components of Stable Diffusion 1 and 2 that have weights, and the classes they must have."""


def _is_stable_diffusion(parts: Parts) -> bool:
    """One CLIP text encoder conditions a UNet that sees nothing but the latents."""
    has_other_encoders = any(name.startswith("text_encoder_") for name in parts.classes)
    return (
        not has_other_encoders
        and all(parts.classes.get(name) == expected for name, expected in CLASSES.items())
        and parts.unet.in_channels == parts.vae.latent_channels
        and parts.unet.cross_attention_dim == parts.text_encoder.hidden_size
    )


def _has_traits_of_sd2(parts: Parts) -> bool:
    """OpenCLIP's text encoder (plain GELU, or 1,024 wide), or the v-prediction of the 768 model."""
    return (
        parts.text_encoder.hidden_act == "gelu"
        or parts.unet.cross_attention_dim == 1024
        or parts.scheduler.prediction_type == "v_prediction"
    )


def _is_sd1(parts: Parts) -> bool:
    return (
        _is_stable_diffusion(parts)
        and parts.scheduler.prediction_type == "epsilon"
        and not _has_traits_of_sd2(parts)
    )


def _is_sd2(parts: Parts) -> bool:
    return (
        _is_stable_diffusion(parts)
        and parts.scheduler.prediction_type in {"epsilon", "v_prediction"}
        and _has_traits_of_sd2(parts)
    )


FAMILIES = [
    Family("sd1", "Stable Diffusion 1.x: OpenAI CLIP text encoder, epsilon prediction", _is_sd1),
    Family("sd2", "Stable Diffusion 2.x: OpenCLIP text encoder, epsilon or v", _is_sd2),
]


def identify(parts: Parts) -> Family | None:
    """The family these parts make up, if we support it."""
    return next((family for family in FAMILIES if family.matches(parts)), None)
