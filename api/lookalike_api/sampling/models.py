"""Base models kept in memory with what they wear, the most recently used ones. Imports torch."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from lookalike_api.sampling.loras import ResidentLoras
from lookalike_api.sampling.messages import AdapterFile
from lookalike_datasets.features.text import tokenize
from lookalike_platform.conditioning import Text, encode
from lookalike_registry.adapter_file import check_against_base
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import METHOD_KEY, check_tensors
from lookalike_trainers.base_parts import spell
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.methods.method import TakeOff

MAX_BASES = 2
MAX_TEXTS = 256


class ResidentBases:
    """At most `MAX_BASES` base models, by fingerprint; the one unused for longest goes first."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._bases: OrderedDict[tuple[str, str], ResidentBase] = OrderedDict()

    def get(self, fingerprint: str, folder: Path, device: str) -> "ResidentBase":
        key = (fingerprint, device)
        if key not in self._bases:
            while len(self._bases) >= MAX_BASES:
                self._bases.popitem(last=False)
            self._bases[key] = ResidentBase(folder, device, self._cache)
        self._bases.move_to_end(key)
        return self._bases[key]


class ResidentBase:
    """One base model on its device, with the adapters and texts used last.

    LoRAs stay in it once they are loaded (`loras.py`); what other methods change is put on and
    taken off again (`trainers/methods`). diffusers' pipeline holds the parts; what it is not used
    for is sampling.
    """

    def __init__(self, folder: Path, device: str, cache: Path | None = None) -> None:
        diffusers_logging.disable_progress_bar()
        self.folder = folder
        self.cache = cache
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=self.dtype, local_files_only=True, use_safetensors=True
        ).to(self.device)
        self.unet = pipeline.unet.eval()
        self.vae = pipeline.vae.eval()
        if self.vae.config.force_upcast:  # SDXL's overflows in half precision
            self.vae.float()
        self.text_encoders = _present(pipeline, "text_encoder", "text_encoder_2")
        self.tokenizers = _present(pipeline, "tokenizer", "tokenizer_2")
        self.learned: dict[str, list[str]] = {}
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.vae_scale: int = pipeline.vae_scale_factor
        self.resolution: int = self.unet.config.sample_size * self.vae_scale
        self.channels: int = self.unet.config.in_channels
        self._silent_blank = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        self._loras = ResidentLoras(pipeline, folder)
        self._texts: OrderedDict[tuple[object, ...], Text] = OrderedDict()
        self._worn: list[tuple[AdapterFile, TakeOff]] = []
        self._acting_on_text: tuple[tuple[str, float, str], ...] = ()

    def wear(self, adapters: Sequence[AdapterFile]) -> None:
        """Make exactly these adapters act, each at its scale, loading those not in memory.

        Raises:
            InvalidRequest: a file does not fit this base, or not all of it could be loaded.
        """
        others = [adapter for adapter in adapters if _method(adapter) is not None]
        if [adapter for adapter, _ in self._worn] != others:
            while self._worn:
                self._worn.pop()[1]()
            for adapter in others:
                self._worn.append((adapter, self._put_on(adapter)))
        self._loras.wear([adapter for adapter in adapters if adapter not in others])
        self._acting_on_text = tuple(
            (adapter.digest, adapter.scale, adapter.word)
            for adapter in adapters
            if adapter in others or self._loras.changes_text(adapter.digest)
        )

    def embed(self, text: str) -> Text:
        """A prompt, one row, under the adapters worn now."""
        key = (text, self._acting_on_text)
        if key not in self._texts:
            spelled = spell(text, self.learned)
            ids = torch.stack([tokenize(t, [spelled]) for t in self.tokenizers], dim=1)
            with torch.inference_mode():
                self._texts[key] = encode(self.text_encoders, ids.to(self.device), self.resolution)
            while len(self._texts) > MAX_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def embed_negative(self, text: str) -> Text:
        """A negative prompt; the empty one of SDXL is nothing at all, as diffusers has it."""
        embedded = self.embed(text)
        return embedded.silenced() if self._silent_blank and not text else embedded

    @property
    def max_tokens(self) -> int:
        """Tokens the text encoders read, start and end marks included."""
        return min(int(tokenizer.model_max_length) for tokenizer in self.tokenizers)

    def tokens(self, text: str) -> int:
        """Tokens of a prompt before any is cut off, start and end marks included."""
        spelled = spell(text, self.learned)
        return max(len(tokenizer(spelled).input_ids) for tokenizer in self.tokenizers)

    def _put_on(self, adapter: AdapterFile) -> TakeOff:
        method = _method(adapter)
        assert method is not None
        ours = METHOD_KEY in read_header(adapter.path).metadata
        (check_tensors if ours else check_against_base)(adapter.path, self.folder)
        return wear_of(method)(self, adapter.path, adapter.scale, adapter.word)


def _method(adapter: AdapterFile) -> str | None:
    """The method that puts the file on; None for a LoRA, which stays loaded.

    A DoRA does not: PEFT scales its B A and leaves its lengths, so that 0 would not be the base.
    """
    header = read_header(adapter.path)
    dora = any("lora_magnitude_vector" in key for key in header.tensors)
    return header.metadata.get(METHOD_KEY, "lora" if dora else None)


def _present(pipeline: Any, *names: str) -> list[Any]:
    parts = [getattr(pipeline, name, None) for name in names]
    return [part for part in parts if part is not None]
