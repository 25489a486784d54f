"""Regions of a picture, each with a prompt and adapters of its own. Torch.

Every latent belongs to one region, and so does every token of the text, which is the regions'
prompts one after the other. A place p of region r hears its own region's tokens alone, and a
product B A acts on the places, or on the tokens, of its own region:

    o_p = softmax(q_p K_r^T / sqrt(d)) V_r,        y_p + [p in r] B_r A_r x_p

(Mix-of-Show, Gu et al. 2023, regionally controllable sampling). The first is one softmax over all
tokens where those of other regions weigh exp(-inf) = 0, so that nothing of a region's prompt or
adapters reaches another's places there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.methods.row_adapter import RowAdapter

NO_PLACE = ("time_embedding.", "time_emb_proj", "add_embedding.", "class_embedding.")
"""In the names of layers whose input is of the whole picture, and of no place in it."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A picture's regions, numbered from 0.

    cells: the region of each latent, [height, width]
    tokens: the region of each token, [tokens]
    homes: the region of each adapter of an outfit, in its order
    """

    cells: torch.Tensor
    tokens: torch.Tensor
    homes: tuple[int, ...]
    _levels: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def places(self, count: int) -> torch.Tensor:
        """The region of each place, [count], row by row, where the UNet has so many of them.

        Each level of the UNet halves both sides. A place belongs to the region that most of its
        latents are of, of equals to the later one.
        """
        if count not in self._levels:
            shares = functional.one_hot(self.cells).permute(2, 0, 1).double()
            shares = functional.adaptive_avg_pool2d(shares, self._level(count))
            last_first = shares.flatten(1).flip(0).argmax(0)
            self._levels[count] = len(shares) - 1 - last_first
        return self._levels[count]

    def heard(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of `count` places: 0, or -inf for tokens of other regions,
        [count, tokens]."""
        others = self.places(count).unsqueeze(1) != self.tokens
        return torch.zeros(others.shape, dtype=dtype, device=others.device).masked_fill_(
            others, -torch.inf
        )

    def _level(self, count: int) -> tuple[int, int]:
        height, width = self.cells.shape
        while height * width > count:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != count:
            raise ValueError(f"no level of a UNet has {count} places of {self.cells.shape}")
        return height, width


def check_placed(adapter: RowAdapter) -> None:
    """Raises InvalidRequest for changes that cannot be kept to a region's places."""
    problems = [
        FieldProblem(name, "is of the whole picture: what it says has no place")
        for name in adapter.products
        if any(part in name for part in NO_PLACE)
    ]
    if problems:
        raise InvalidRequest(
            "It changes layers that know no places, and cannot be kept to a region of the "
            'attention: ask for "compose": "latents", or train it without those layers.',
            problems,
        )


def hear_own_region(readers: Sequence[nn.Module], layouts: Sequence[Layout]) -> list[Any]:
    """Let cross-attention layers keep to the regions, `layouts` being one a row; gives handles."""

    masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0]
        asked = x.shape[1], x.dtype
        if asked not in masks:  # the same for all layers of a level, and for every step
            masks[asked] = torch.stack([layout.heard(*asked) for layout in layouts])
        return args, {**kwargs, "attention_mask": masks[asked]}

    return [reader.register_forward_pre_hook(before, with_kwargs=True) for reader in readers]
