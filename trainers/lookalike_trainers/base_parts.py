"""The parts of a base model, each loaded when first needed and let go when no longer. Torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lookalike_datasets.features.text import tokenize


class BaseParts:
    """A diffusers folder of the family of Stable Diffusion 1 and 2, part by part.

    Only the submodule of each part is imported: diffusers as a whole takes seconds.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self._loaded: dict[str, Any] = {}

    @property
    def unet(self) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return self._part("unet", UNet2DConditionModel)

    @property
    def vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return self._part("vae", AutoencoderKL)

    @property
    def text_encoder(self) -> Any:
        from transformers.models.clip.modeling_clip import CLIPTextModel

        return self._part("text_encoder", CLIPTextModel)

    @property
    def tokenizer(self) -> Any:
        if "tokenizer" not in self._loaded:
            from transformers.models.clip.tokenization_clip import CLIPTokenizer

            self._loaded["tokenizer"] = CLIPTokenizer.from_pretrained(
                self.folder / "tokenizer", local_files_only=True
            )
        return self._loaded["tokenizer"]

    @property
    def scheduler(self) -> Any:
        """The base's noise schedule, as the sampler of Ho et al. 2020 that training inverts."""
        if "scheduler" not in self._loaded:
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

            self._loaded["scheduler"] = DDPMScheduler.from_pretrained(
                self.folder / "scheduler", local_files_only=True
            )
        return self._loaded["scheduler"]

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text features [prompts, tokens, width] of the base's own text encoder."""
        ids = tokenize(self.tokenizer, prompts).to(self.device)
        features: torch.Tensor = self.text_encoder(ids)[0]
        return features

    def take(self, name: str) -> Any:
        """Hand a part over to the caller, and keep no hold on it."""
        part = getattr(self, name)
        del self._loaded[name]
        return part

    def release(self) -> None:
        """Let go of everything but the tokenizer and the schedule, which are small."""
        for name in ("unet", "vae", "text_encoder"):
            self._loaded.pop(name, None)

    def _part(self, name: str, kind: Any) -> Any:
        if name not in self._loaded:
            part = kind.from_pretrained(
                self.folder / name,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
            )
            self._loaded[name] = part.requires_grad_(False).eval().to(self.device)
        return self._loaded[name]
