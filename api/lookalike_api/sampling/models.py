"""Base models kept in memory, the most recently used ones. Imports torch."""

import gc
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from lookalike_api.sampling.loading import check, method_of
from lookalike_api.sampling.messages import AdapterFile
from lookalike_datasets.features.text import tokenize
from lookalike_platform.conditioning import Text, encode, pool_at_end
from lookalike_platform.device import device_of
from lookalike_trainers.base_parts import spell
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.methods.method import TakeOff
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.row_edits import RowEdits

MAX_BASES = 2
TEXT_BYTES = 2**26  # of prompts kept as the text encoders read them


class ResidentBases:
    """At most `MAX_BASES` base models, by fingerprint; the one unused for longest goes first."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._bases: OrderedDict[tuple[str, str], ResidentBase] = OrderedDict()

    def rest(self, in_use: Sequence["ResidentBase"]) -> None:
        """What rows wore last of those that nobody paints with leaves memory."""
        for base in self._bases.values():
            if base not in in_use:
                base.edits.put_on([])

    def get(
        self,
        fingerprint: str,
        folder: Path,
        device: str,
        in_use: Sequence["ResidentBase"] = (),
        *,
        only_there: bool = False,
    ) -> "ResidentBase | None":
        """The base, loaded if it is not there, unless `only_there`; None while those in use leave
        no room for it."""
        key = (fingerprint, device)
        if key not in self._bases:
            if only_there:
                return None
            for other in [k for k, base in self._bases.items() if base not in in_use]:
                if len(self._bases) < MAX_BASES:
                    break
                del self._bases[other]
            if len(self._bases) >= MAX_BASES:
                return None
            # The one before is gone now, not later: paintings and batches hold each other, and it.
            gc.collect()
            self._bases[key] = ResidentBase(folder, device, fingerprint, self._cache)
        self._bases.move_to_end(key)
        return self._bases[key]


@dataclass(frozen=True)
class Dressed:
    """An adapter in memory that acts on single rows, as one request has it."""

    adapter: RowAdapter
    file: AdapterFile


@dataclass(frozen=True)
class Read:
    """A prompt as the text encoders read it, one row, and how many tokens long it is."""

    text: Text
    tokens: int


class ResidentBase:
    """One base model on its device, with the texts used last.

    Adapters act on single rows of a batch (`edits`); those that cannot are worn by the base as a
    whole (`wear`). diffusers' pipeline holds the parts; what it is not used for is sampling.
    """

    def __init__(
        self, folder: Path, device: str, fingerprint: str, cache: Path | None = None
    ) -> None:
        diffusers_logging.disable_progress_bar()
        self.folder, self.fingerprint = folder, fingerprint
        self.cache = cache
        self.device = device_of(device)
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
        pool_at_end(self.text_encoders, self.tokenizers)
        self.learned: dict[str, list[str]] = {}
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.vae_scale: int = pipeline.vae_scale_factor
        self.resolution: int = self.unet.config.sample_size * self.vae_scale
        self.channels: int = self.unet.config.in_channels
        self.edits = RowEdits(self.unet)
        self._silent_blank = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        self._texts: OrderedDict[tuple[object, ...], Read] = OrderedDict()
        self._worn: list[tuple[AdapterFile, TakeOff]] = []

    def wear(self, adapters: Sequence[AdapterFile]) -> None:
        """Make the whole base wear exactly these, each at its scale.

        Raises:
            InvalidRequest: a file does not fit this base; it wears nothing then.
        """
        if self.worn == tuple(adapters):
            return
        with torch.inference_mode(False):  # weights changed in it could not be changed back
            while self._worn:
                self._worn.pop()[1]()
            try:
                for adapter in adapters:
                    check(adapter, self.folder)
                    put_on = wear_of(method_of(adapter.path))
                    self._worn.append(
                        (adapter, put_on(self, adapter.path, adapter.scale, adapter.word))
                    )
            except BaseException:
                while self._worn:
                    self._worn.pop()[1]()
                raise

    @property
    def worn(self) -> tuple[AdapterFile, ...]:
        return tuple(adapter for adapter, _ in self._worn)

    def read(self, text: str, dressed: Sequence[Dressed]) -> Read:
        """A prompt under what the base wears now and what its own rows wear."""
        on_text = [one for one in dressed if one.adapter.text]
        files = [*self.worn, *(one.file for one in on_text)]
        key = (text, tuple((file.digest, file.scale, file.word) for file in files))
        if key not in self._texts:
            take_off: list[TakeOff] = []
            try:
                for one in on_text:
                    wear_text, file = one.adapter.wear_text, one.file
                    take_off.append(wear_text(self, one.adapter.text, file.scale, file.word))
                self._texts[key] = self._read(text)
            finally:
                while take_off:
                    take_off.pop()()
            while len(self._texts) > 1 and self._text_bytes() > TEXT_BYTES:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def read_negative(self, text: str, dressed: Sequence[Dressed]) -> Read:
        """A negative prompt; the empty one of SDXL is nothing at all, as diffusers has it."""
        read = self.read(text, dressed)
        if self._silent_blank and not text:
            return Read(read.text.silenced(), read.tokens)
        return read

    @property
    def max_tokens(self) -> int:
        """Tokens the text encoders read, start and end marks included."""
        return min(int(tokenizer.model_max_length) for tokenizer in self.tokenizers)

    def _text_bytes(self) -> int:
        texts = [read.text.tensors() for read in self._texts.values()]
        return sum(tensor.nbytes for tensors in texts for tensor in tensors.values())

    def _read(self, text: str) -> Read:
        spelled = spell(text, self.learned)
        ids = torch.stack([tokenize(t, [spelled]) for t in self.tokenizers], dim=1)
        with torch.inference_mode():
            encoded = encode(self.text_encoders, ids.to(self.device), self.resolution)
        return Read(encoded, max(len(t(spelled).input_ids) for t in self.tokenizers))


def _present(pipeline: Any, *names: str) -> list[Any]:
    parts = [getattr(pipeline, name, None) for name in names]
    return [part for part in parts if part is not None]
