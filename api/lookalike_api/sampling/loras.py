"""LoRAs kept loaded in a base model: switched on and off, never loaded twice. Imports torch."""

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import check_against_base

MAX_ADAPTER_BYTES = 2**30

log = logging.getLogger(__name__)


class ResidentLoras:
    """The LoRAs in a pipeline's models, those used last; diffusers loads and scales them."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        self.folder = folder
        self._pipeline = pipeline
        self._bytes: OrderedDict[str, int] = OrderedDict()  # by digest
        self._in_text: set[str] = set()

    def wear(self, adapters: Sequence[AdapterFile]) -> None:
        """Make exactly these act: W' = W + sum of scale * (alpha / rank) B A.

        Raises:
            InvalidRequest: a file does not fit this base, or not all of it could be loaded.
        """
        for adapter in adapters:
            if adapter.digest not in self._bytes:
                self._load(adapter)
            self._bytes.move_to_end(adapter.digest)
        self._evict(keep={adapter.digest for adapter in adapters})
        if adapters:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(
                [adapter.digest for adapter in adapters], [adapter.scale for adapter in adapters]
            )
        elif self._bytes:
            self._pipeline.disable_lora()

    def changes_text(self, digest: str) -> bool:
        return digest in self._in_text

    def _load(self, adapter: AdapterFile) -> None:
        header = check_against_base(adapter.path, self.folder)
        device = str(self._pipeline.unet.device)
        state = load_file(adapter.path, device=device)
        common: dict[str, Any] = {
            "network_alphas": None,
            "adapter_name": adapter.digest,
            "metadata": json.loads(header.metadata["lora_adapter_metadata"]),
            "_pipeline": self._pipeline,
            "low_cpu_mem_usage": True,
        }
        try:
            self._pipeline.load_lora_into_unet(state, unet=self._pipeline.unet, **common)
            for prefix in ("text_encoder", "text_encoder_2"):
                if any(key.startswith(f"{prefix}.") for key in state):
                    encoder = getattr(self._pipeline, prefix)
                    self._pipeline.load_lora_into_text_encoder(
                        state, text_encoder=encoder, prefix=prefix, **common
                    )
                    self._in_text.add(adapter.digest)
            self._check_loaded(adapter, len(state))
        except Exception:
            self._forget(adapter.digest)
            raise
        self._bytes[adapter.digest] = sum(t.nbytes for t in state.values())

    def _check_loaded(self, adapter: AdapterFile, expected: int) -> None:
        """diffusers only logs keys it could not place, and then paints with the base alone."""
        part = f".{adapter.digest}."
        models = [
            getattr(self._pipeline, name, None)
            for name in ("unet", "text_encoder", "text_encoder_2")
        ]
        loaded = sum(
            part in name
            for model in models
            if model is not None
            for name, _ in model.named_parameters()
        )
        if loaded != expected:
            raise InvalidRequest(
                f"Only {loaded} of the {expected} tensors of {adapter.ref} could be loaded into "
                f"{self.folder.name}; the file does not belong to this base model."
            )

    def _evict(self, keep: set[str]) -> None:
        for digest in list(self._bytes):
            if sum(self._bytes.values()) <= MAX_ADAPTER_BYTES:
                return
            if digest not in keep:
                log.info("dropping adapter %s from memory", digest)
                self._forget(digest)

    def _forget(self, digest: str) -> None:
        self._pipeline.delete_adapters(digest)
        self._bytes.pop(digest, None)
        self._in_text.discard(digest)
