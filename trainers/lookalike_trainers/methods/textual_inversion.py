"""Textual Inversion (Gal et al. 2023): one word learns what the photos show, and nothing else does.

    v* = argmin_v E || e - e_theta(x_t, t, c(y, v)) ||^2      (eq. 2)

v: the word's 1 to 16 rows in the text encoder's embedding table, begun at an initialiser word's;
y: captions drawn from a fixed set (templates.py); denoiser and text encoder stay frozen, so the
gradient passes through them and none is computed for their weights. SDXL learns rows for each of
its two encoders.

The rows are held at the length of the vocabulary's own words (`tokens.word_norm`), unless
`keep_norm` is off: rows that grow drown the prompt's other words, and short ones say little.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, adapter_info, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import TextualInversionConfig
from lookalike_trainers.methods.deltas import part_name
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.tokens import learn_rows, saved_rows, wear_words, word_rows
from lookalike_trainers.objective import weighted_mse

NAME = "textual_inversion"


class TextualInversion:
    """The method, holding a frozen base and the rows of its new word."""

    def __init__(self, parts: Any, config: TextualInversionConfig) -> None:
        self.config = config
        self.initializer = str(config.initializer)
        bf16 = config.mixed_precision == "bf16"
        unet, text_encoders = parts.take_frozen_unet(bf16=bf16), parts.take("text_encoders")
        self.rows = learn_rows(
            parts, text_encoders, config.trigger, self.initializer, keep_norm=config.keep_norm
        )
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(unet, text_encoders, bf16=bf16, silent=parts.silent_ids())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.config, words=self.rows)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        about = {"initializer": self.initializer}
        save_tensors(path, NAME, saved_rows(self.rows), about, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> TextualInversion:
    assert isinstance(config, TextualInversionConfig)
    return TextualInversion(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    adapter = rows(wearer, file)
    return adapter.wear_text(wearer, adapter.text, scale, word)


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    from safetensors.torch import load_file

    initializer = adapter_info(read_header(file), file.name).config["initializer"]
    return RowAdapter(load_file(file), partial(_wear_text, initializer=initializer))


def rows_at(
    wearer: Wearer, text: Mapping[str, torch.Tensor], scale: float, initializer: str
) -> dict[str, torch.Tensor]:
    """Rows between the initialiser word's, at scale 0, and the learned ones, at scale 1."""
    scaled = {}
    for place, encoder in enumerate(wearer.text_encoders):
        key = f"tokens.{part_name(place)}"
        learned = text[key].float()
        start = word_rows(encoder, wearer.tokenizers[place], initializer, len(learned))
        scaled[key] = torch.lerp(start.to("cpu", learned.dtype), learned, scale)
    return scaled


def _wear_text(
    wearer: Wearer,
    text: Mapping[str, torch.Tensor],
    scale: float,
    word: str,
    initializer: str,
) -> TakeOff:
    return wear_words(wearer, rows_at(wearer, text, scale, initializer), word)
