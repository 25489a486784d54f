"""What the loop asks of a method. The loop, caches and checkpoints know no method by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lookalike_trainers.config import TrainingConfig


@dataclass(frozen=True)
class Card:
    """What an adapter file says about itself, whatever the method."""

    title: str
    family: str
    resolution: int
    trigger: str
    prediction_type: str


class Method(Protocol):
    """A method's trainables and how they are kept.

    `module` holds all of them in one `nn.Module` whose forward takes (noisy latents
    [n, c, h, w], timesteps [n], text) and gives the denoiser's prediction [n, c, h, w]; text is
    features [n, tokens, width], or ids [n, tokens] if `wants_ids`.
    """

    module: nn.Module
    wants_ids: bool

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters with their learning rates, as torch's optimisers take them."""
        ...

    def loss(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """The scalar to minimise; see objective.py."""
        ...

    def save(self, path: Path, card: Card) -> str:
        """Write the adapter file and return its sha256. Parameters are whole when called."""
        ...


class Builder(Protocol):
    """A method's entry in config.METHODS."""

    def __call__(self, parts: Any, config: TrainingConfig) -> Method: ...
