"""A base model's parts, each loaded when it is first asked for and let go when it has served.

Torch. Everything is frozen, and float32 but for `take_frozen_unet`; a method thaws what it trains.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lookalike_datasets.features.text import tokenize
from lookalike_platform.conditioning import Text, encode, pool_at_end
from lookalike_platform.families import FLOW_SCHEDULER
from lookalike_trainers.streamed import load_streamed


class BaseParts:
    """A diffusers folder of Stable Diffusion 1, 2 or XL, part by part.

    Only the submodule of each part is imported: diffusers as a whole takes seconds.

    Args:
        cache: the folder for what is computed from a base once and for all; None keeps nothing.
    """

    def __init__(self, folder: Path, device: torch.device, cache: Path | None = None) -> None:
        self.folder = folder
        self.device = device
        self.cache = cache
        self.learned: dict[str, list[str]] = {}
        self._loaded: dict[str, Any] = {}
        self._names = [f"text_encoder{suffix}" for suffix in self._suffixes()]

    @property
    def unet(self) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return self._part("unet", UNet2DConditionModel)

    @property
    def vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return self._part("vae", AutoencoderKL)

    @property
    def text_encoders(self) -> list[Any]:
        """One, or SDXL's two."""
        from transformers.models.clip import modeling_clip

        kinds = (modeling_clip.CLIPTextModel, modeling_clip.CLIPTextModelWithProjection)
        parts = [self._part(name, kind) for name, kind in zip(self._names, kinds, strict=False)]
        pool_at_end(parts, self.tokenizers)
        return parts

    @property
    def tokenizers(self) -> list[Any]:
        if "tokenizers" not in self._loaded:
            from transformers.models.clip.tokenization_clip import CLIPTokenizer

            self._loaded["tokenizers"] = [
                CLIPTokenizer.from_pretrained(
                    self.folder / f"tokenizer{suffix}", local_files_only=True
                )
                for suffix in self._suffixes()
            ]
        tokenizers: list[Any] = self._loaded["tokenizers"]
        return tokenizers

    @property
    def scheduler(self) -> Any:
        """The base's noise schedule: a flow's, or that of Ho et al. 2020 that training inverts."""
        if "scheduler" not in self._loaded:
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteScheduler,
            )

            config = json.loads((self.folder / "scheduler/scheduler_config.json").read_text())
            flows = config.get("_class_name") == FLOW_SCHEDULER
            kind = FlowMatchEulerDiscreteScheduler if flows else DDPMScheduler
            self._loaded["scheduler"] = kind.from_pretrained(
                self.folder / "scheduler", local_files_only=True
            )
        return self._loaded["scheduler"]

    @property
    def vae_scale(self) -> int:
        """Pixels of a side per latent."""
        config = json.loads((self.folder / "vae/config.json").read_text())
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids [prompts, encoders, tokens]; see `tokens.py` for words that are learned."""
        spelled = [spell(prompt, self.learned) for prompt in prompts]
        return torch.stack([tokenize(tokenizer, spelled) for tokenizer in self.tokenizers], dim=1)

    def says(self, prompt: str, word: str) -> bool:
        """Whether a prompt has a word as one of its own."""
        return self._said(prompt, word) is not None

    def reads(self, prompt: str, word: str) -> bool:
        """Whether the encoders read the whole of a word in a prompt: they stop at a length."""
        said, spelled = self._said(prompt, word), spell(prompt, self.learned)
        return said is None or all(
            len(tokenizer(spelled[: said.end()], verbose=False).input_ids)
            <= tokenizer.model_max_length
            for tokenizer in self.tokenizers
        )

    def _said(self, prompt: str, word: str) -> re.Match[str] | None:
        """The word's last token, in the prompt as it is spelled."""
        last = self.learned.get(word, [word])[-1]
        return re.search(rf"(?<!\w){re.escape(last)}(?!\w)", spell(prompt, self.learned), re.I)

    def encode(self, prompts: Sequence[str], resolution: int) -> Text:
        """Prompts as the base's own text encoders read them."""
        return encode(self.text_encoders, self.ids(prompts).to(self.device), resolution)

    def blank(self, resolution: int) -> Text:
        """The empty negative prompt as sampling takes it: SDXL's is nothing at all."""
        text = self.encode([""], resolution)
        return text.silenced() if self.blank_is_silent else text

    @property
    def blank_is_silent(self) -> bool:
        index = json.loads((self.folder / "model_index.json").read_text())
        return bool(index.get("force_zeros_for_empty_prompt"))

    def silent_ids(self) -> torch.Tensor | None:
        """The empty prompt's ids [1, encoders, tokens], where sampling takes it as nothing."""
        return self.ids([""]) if self.blank_is_silent else None

    def learn(self, word: str, count: int) -> None:
        """From now on `word` in a prompt is `count` new tokens of the tokenizers.

        Their ids follow the vocabulary's; `tokens.py` gives the encoders rows for them.
        """
        self.learned[word] = token_names(word, count)
        for tokenizer in self.tokenizers:
            tokenizer.add_tokens(self.learned[word])

    def take(self, name: str) -> Any:
        """Hand a part (`unet`, `text_encoders`) over to the caller, and keep no hold on it."""
        part = getattr(self, name)
        for key in self._names if name == "text_encoders" else [name]:
            del self._loaded[key]
        return part

    def take_frozen_unet(self, *, bf16: bool) -> Any:
        """Hand the UNet over to somebody who leaves its weights as they are.

        bf16: rounded already where autocast would round them in every step; see streamed.py.
        """
        if not bf16 or "unet" in self._loaded:
            return self.take("unet")
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        with torch.inference_mode(False):
            unet = load_streamed(UNet2DConditionModel, self.folder / "unet", torch.bfloat16)
        return unet.requires_grad_(False).eval().to(self.device)

    def release(self) -> None:
        """Let go of everything but the tokenizers and the schedule, which are small."""
        for name in ("unet", "vae", *self._names):
            self._loaded.pop(name, None)

    def _suffixes(self) -> list[str]:
        return [s for s in ("", "_2") if (self.folder / f"text_encoder{s}").is_dir()]

    def _part(self, name: str, kind: Any) -> Any:
        if name not in self._loaded:
            # Loaded while something is painted, its weights could never be changed after it.
            with torch.inference_mode(False):
                part = kind.from_pretrained(
                    self.folder / name,
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                )
                self._loaded[name] = part.requires_grad_(False).eval().to(self.device)
        return self._loaded[name]


def token_names(word: str, count: int) -> list[str]:
    """The tokens a learned word stands for, named as diffusers names them: `<w>`, `<w>_1`, …"""
    return [f"<{word}>", *(f"<{word}>_{place}" for place in range(1, count))]


def spell(prompt: str, learned: dict[str, list[str]]) -> str:
    """The prompt with each learned word written as its tokens: "sks" → "<sks> <sks>_1".

    Longer words go first: "sks-2" is not "sks".
    """
    for word, names in sorted(learned.items(), key=lambda item: -len(item[0])):
        pattern = rf"(?<![\w<]){re.escape(word)}(?![\w>])"
        prompt = re.sub(pattern, " ".join(names), prompt, flags=re.IGNORECASE)
    return prompt
