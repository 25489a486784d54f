"""What the loop asks of a method, and what sampling does. Loop and caches know none by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lookalike_registry.tensor_file import modelspec
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser


@dataclass(frozen=True)
class Card:
    """What an adapter file says about itself, whatever the method."""

    title: str
    family: str
    resolution: int
    trigger: str
    prediction_type: str

    def modelspec(self, method: str) -> dict[str, str]:
        """The fields of ModelSpec 1.0.1, as `tensor_file.save_tensors` takes them."""
        return modelspec(method, **vars(self))


class Method(Protocol):
    """A method's trainables and how they are kept.

    `module` holds all of them. It takes ids where it has text encoders, else text features.
    """

    module: Denoiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters with their learning rates, as torch's optimisers take them."""
        ...

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The scalar to minimise; see objective.py."""
        ...

    def save(self, folder: Path, card: Card) -> Path:
        """Write the adapter file into the folder. Parameters are whole when called."""
        ...


class Builder(Protocol):
    """A method's entry in catalog.METHODS: its trainables put into a base's parts."""

    def __call__(self, parts: Any, config: TrainingConfig) -> Method: ...


class Wearer(Protocol):
    """What an adapter is put on: a base in memory, as a diffusers pipeline or BaseParts holds it.

    learned: words that stand for learned tokens, see `BaseParts.learn`.
    folder: the base in diffusers' layout.
    cache: the folder for what is computed from a base once and for all; None keeps nothing.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def cache(self) -> Path | None: ...

    @property
    def unet(self) -> Any: ...

    @property
    def text_encoders(self) -> Sequence[Any]: ...

    @property
    def tokenizers(self) -> list[Any]: ...

    @property
    def learned(self) -> dict[str, list[str]]: ...


TakeOff = Callable[[], None]
"""Undoes what put an adapter on, to the bit."""


class Wear(Protocol):
    """A method's other entry in catalog.METHODS: a saved adapter acts on a base, at a scale.

    Args of a call: the wearer; the file; the scale, 1 being as trained and 0 not at all; and the
    word that its prompts use for what was learned, where tokens were.
    """

    def __call__(self, wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff: ...
