"""Base models and adapters kept in memory, the most recently used ones. Imports torch."""

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

from lookalike_api.sampling.messages import AdapterFile
from lookalike_datasets.features.text import tokenize
from lookalike_platform.conditioning import Text, encode
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import check_against_base

MAX_BASES = 2
MAX_ADAPTER_BYTES = 2**30
MAX_TEXTS = 256

log = logging.getLogger(__name__)


class ResidentBases:
    """At most `MAX_BASES` base models, by fingerprint; the one unused for longest goes first."""

    def __init__(self) -> None:
        self._bases: OrderedDict[tuple[str, str], ResidentBase] = OrderedDict()

    def get(self, fingerprint: str, folder: Path, device: str) -> "ResidentBase":
        key = (fingerprint, device)
        if key not in self._bases:
            while len(self._bases) >= MAX_BASES:
                self._bases.popitem(last=False)
            self._bases[key] = ResidentBase(folder, device)
        self._bases.move_to_end(key)
        return self._bases[key]


class ResidentBase:
    """One base model on its device, with the adapters and text embeddings used last.

    diffusers' own pipeline holds the parts, loads adapters into them and scales them; what it is
    not used for is sampling.
    """

    def __init__(self, folder: Path, device: str) -> None:
        diffusers_logging.disable_progress_bar()
        self.folder = folder
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=self.dtype,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        ).to(self.device)
        self.unet = self._pipeline.unet.eval()
        self.vae = self._pipeline.vae.eval()
        self.scheduler_config = dict(self._pipeline.scheduler.config)
        self.vae_scale: int = self._pipeline.vae_scale_factor
        self.resolution: int = self.unet.config.sample_size * self.vae_scale
        self.channels: int = self.unet.config.in_channels
        self._adapters: OrderedDict[str, int] = OrderedDict()  # digest → bytes
        self._text_adapters: set[str] = set()
        self._texts: OrderedDict[tuple[object, ...], Text] = OrderedDict()
        self._active: tuple[tuple[str, float], ...] = ()

    def wear(self, adapters: Sequence[AdapterFile]) -> None:
        """Make exactly these adapters act, each at its scale, loading those not in memory.

        The adapters' products add up: W' = W + sum of scale * (alpha / rank) B A.

        Raises:
            InvalidRequest: a file does not fit this base, or not all of it could be loaded.
        """
        for adapter in adapters:
            if adapter.digest not in self._adapters:
                self._load(adapter)
            self._adapters.move_to_end(adapter.digest)
        self._evict(keep={adapter.digest for adapter in adapters})
        if adapters:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(
                [adapter.digest for adapter in adapters], [adapter.scale for adapter in adapters]
            )
        elif self._adapters:
            self._pipeline.disable_lora()
        self._active = tuple((adapter.digest, adapter.scale) for adapter in adapters)

    def embed(self, text: str) -> Text:
        """A prompt, one row, under the adapters worn now."""
        acting = tuple(pair for pair in self._active if pair[0] in self._text_adapters)
        key = (text, acting)
        if key not in self._texts:
            ids = tokenize(self._pipeline.tokenizer, [text]).unsqueeze(1).to(self.device)
            with torch.inference_mode():
                self._texts[key] = encode([self._pipeline.text_encoder], ids, self.resolution)
            while len(self._texts) > MAX_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    @property
    def max_tokens(self) -> int:
        """Tokens the text encoder reads, start and end marks included."""
        length: int = self._pipeline.tokenizer.model_max_length
        return length

    def tokens(self, text: str) -> int:
        """Tokens of a prompt before any is cut off, start and end marks included."""
        return len(self._pipeline.tokenizer(text).input_ids)

    def _load(self, adapter: AdapterFile) -> None:
        header = check_against_base(adapter.path, self.folder)
        state = load_file(adapter.path, device=str(self.device))
        metadata = json.loads(header.metadata["lora_adapter_metadata"])
        common: dict[str, Any] = {
            "network_alphas": None,
            "adapter_name": adapter.digest,
            "metadata": metadata,
            "_pipeline": self._pipeline,
            "low_cpu_mem_usage": True,
        }
        has_text = any(key.startswith("text_encoder.") for key in state)
        try:
            self._pipeline.load_lora_into_unet(state, unet=self.unet, **common)
            if has_text:
                encoder = self._pipeline.text_encoder
                self._pipeline.load_lora_into_text_encoder(state, text_encoder=encoder, **common)
            self._check_loaded(adapter, len(state))
        except Exception:
            self._pipeline.delete_adapters(adapter.digest)
            raise
        self._adapters[adapter.digest] = sum(t.nbytes for t in state.values())
        if has_text:
            self._text_adapters.add(adapter.digest)

    def _check_loaded(self, adapter: AdapterFile, expected: int) -> None:
        """diffusers only logs keys it could not place, and then paints with the base alone."""
        part = f".{adapter.digest}."
        loaded = sum(
            part in name
            for model in (self.unet, self._pipeline.text_encoder)
            for name, _ in model.named_parameters()
        )
        if loaded != expected:
            raise InvalidRequest(
                f"Only {loaded} of the {expected} tensors of {adapter.ref} could be loaded into "
                f"{self.folder.name}; the file does not belong to this base model."
            )

    def _evict(self, keep: set[str]) -> None:
        for digest in list(self._adapters):
            if sum(self._adapters.values()) <= MAX_ADAPTER_BYTES:
                return
            if digest not in keep:
                log.info("dropping adapter %s from memory", digest)
                self._pipeline.delete_adapters(digest)
                del self._adapters[digest]
                self._text_adapters.discard(digest)
