"""Families of base models: which diffusers folders we can train on and sample from.

A family is recognised by the configuration of its parts. To support another one, describe it here
and teach the trainer and the sampler its text encoders and denoiser.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class UNetConfig(_Config):
    sample_size: int = Field(gt=0)
    in_channels: int = 4
    cross_attention_dim: int = 1280
    addition_embed_type: str | None = None


class VaeConfig(_Config):
    block_out_channels: tuple[int, ...] = Field(min_length=1)
    latent_channels: int = 4


class TextEncoderConfig(_Config):
    """The defaults are those of transformers' CLIPTextConfig, which older files leave out."""

    hidden_size: int = 512
    hidden_act: str = "quick_gelu"
    max_position_embeddings: int = 77


class SchedulerConfig(_Config):
    """A flow base's file names no prediction type: its scheduler's class says it."""

    prediction_type: str = "epsilon"

    @model_validator(mode="before")
    @classmethod
    def _flow(cls, config: Any) -> Any:
        if isinstance(config, dict) and config.get("_class_name") == FLOW_SCHEDULER:
            return config | {"prediction_type": "flow_prediction"}
        return config


@dataclass(frozen=True)
class Parts:
    """What a family is recognised by. `classes`: component → class name, of those present."""

    classes: dict[str, str]
    unet: UNetConfig
    vae: VaeConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    scheduler: SchedulerConfig


@dataclass(frozen=True)
class Family:
    name: str
    summary: str
    matches: Callable[[Parts], bool]


CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""The components that have weights, and the classes they must have. SDXL alone has the second
text encoder."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def text_encoders(classes: Container[str]) -> list[str]:
    """The text encoders among a base's components, in order."""
    return [name for name in TOKENIZERS if name in classes]


def _reads_text(parts: Parts) -> bool:
    """CLIP text encoders condition a UNet, whose text features are theirs side by side."""
    expected = {name: CLASSES[name] for name in ("unet", "vae", *text_encoders(parts.classes))}
    others = {
        name for name in parts.classes if name.startswith("text_encoder") and name not in CLASSES
    }
    widths = sum(encoder.hidden_size for encoder in parts.text_encoders)
    return (
        not others
        and all(parts.classes.get(name) == wanted for name, wanted in expected.items())
        and parts.unet.in_channels == parts.vae.latent_channels
        and parts.unet.cross_attention_dim == widths
    )


def _is_stable_diffusion(parts: Parts) -> bool:
    """One encoder, and a UNet that is told nothing else."""
    return (
        _reads_text(parts)
        and len(parts.text_encoders) == 1
        and parts.unet.addition_embed_type is None
    )


def _has_traits_of_sd2(parts: Parts) -> bool:
    """OpenCLIP's text encoder (plain GELU, or 1,024 wide), or the v-prediction of the 768 model."""
    return (
        parts.text_encoders[0].hidden_act == "gelu"
        or parts.unet.cross_attention_dim == 1024
        or parts.scheduler.prediction_type == "v_prediction"
    )


def _is_sd1(parts: Parts) -> bool:
    return (
        _is_stable_diffusion(parts)
        and parts.scheduler.prediction_type in {"epsilon", "flow_prediction"}
        and not _has_traits_of_sd2(parts)
    )


def _is_sd2(parts: Parts) -> bool:
    return (
        _is_stable_diffusion(parts)
        and parts.scheduler.prediction_type in PREDICTIONS
        and _has_traits_of_sd2(parts)
    )


def _is_sdxl(parts: Parts) -> bool:
    """Two encoders, and a UNet that is told a summary of the prompt and sizes in pixels too."""
    return (
        _reads_text(parts)
        and len(parts.text_encoders) == 2
        and parts.unet.addition_embed_type == "text_time"
        and parts.scheduler.prediction_type in PREDICTIONS
    )


FAMILIES = [
    Family("sd1", "Stable Diffusion 1.x: OpenAI CLIP text encoder, epsilon or flow", _is_sd1),
    Family("sd2", "Stable Diffusion 2.x: OpenCLIP text encoder, epsilon, v or flow", _is_sd2),
    Family(
        "sdxl", "Stable Diffusion XL: two text encoders and sizes, epsilon, v or flow", _is_sdxl
    ),
]


def identify(parts: Parts) -> Family | None:
    """The family these parts make up, if we support it."""
    return next((family for family in FAMILIES if family.matches(parts)), None)
