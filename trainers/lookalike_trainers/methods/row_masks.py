"""Which of the ranks of a layer's products act: M in y + B M A x, by timestep and place. Torch."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from lookalike_trainers.methods.layout import Layout
from lookalike_trainers.methods.row_adapter import Ranks

Mask = Callable[[torch.Tensor], torch.Tensor]
"""M A x of A x, both [rows, places or tokens, R]."""


@dataclass(frozen=True)
class Worn:
    """A product at its scale, and which of its ranks act: at a timestep, in a region."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    ranks: Ranks | None
    region: int | None = None


def mask_of(
    rows: Sequence[Sequence[Worn]],
    timesteps: Callable[[], torch.Tensor],
    layouts: Sequence[Layout | None],
    of_text: bool,
) -> Mask | None:
    """None where all ranks act everywhere and always.

    Args:
        rows: what each row wears beside the layer, its ranks side by side and padded to R.
        timesteps: of these rows at the step that is made, [rows].
        layouts: of these rows.
        of_text: the layer's input is the text.
    """
    worn = [one for side in rows for one in side]
    kept = _kept(rows, timesteps) if any(one.ranks for one in worn) else None
    inside = (
        _inside(rows, layouts, of_text) if any(one.region is not None for one in worn) else None
    )
    if not kept and not inside:
        return None

    def mask(hidden: torch.Tensor) -> torch.Tensor:
        if kept:
            hidden = hidden * kept().unsqueeze(1)
        if inside:
            hidden = hidden * inside(hidden.shape[1])
        return hidden

    return mask


def masked(mask: Mask, hidden: torch.Tensor, layer_dim: int) -> torch.Tensor:
    """M A x of what a linear layer's A says, [rows, ..., R] (2), or a convolution's, [rows, R, h,
    w] (4)."""
    if layer_dim == 4:
        flat = hidden.flatten(2).transpose(1, 2)
        return mask(flat).transpose(1, 2).unflatten(2, hidden.shape[2:])
    flat = hidden.reshape(len(hidden), -1, hidden.shape[-1])
    return mask(flat).view(hidden.shape)


def ranks_at(t: torch.Tensor, rank: Any, min_rank: Any, timesteps: Any) -> torch.Tensor:
    """T-LoRA's r(t) = floor((rank - min_rank) (timesteps - t) / timesteps) + min_rank.

    Of one adapter, whose figures are numbers, or of many, whose are tensors.
    """
    beyond = (rank - min_rank) * (timesteps - t)
    return torch.div(beyond, timesteps, rounding_mode="floor") + min_rank


def _kept(
    rows: Sequence[Sequence[Worn]], timesteps: Callable[[], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """Of T-LoRA's ranks those that act on each row at its timestep, ones in [rows, R]."""
    always = (-1, 0, 0, 1)  # a place below any r(t)

    def columns(one: Worn) -> list[tuple[int, ...]]:
        if one.ranks is None:
            return [always] * len(one.down)
        return [(n % one.ranks.rank, *astuple(one.ranks)) for n in range(len(one.down))]

    table = _padded([[c for one in side for c in columns(one)] for side in rows], always)
    place, rank, least, total = torch.tensor(table, device=_device(rows)).unbind(-1)

    def kept() -> torch.Tensor:
        return place < ranks_at(timesteps().unsqueeze(1), rank, least, total)

    return kept


def _inside(
    rows: Sequence[Sequence[Worn]], layouts: Sequence[Layout | None], of_text: bool
) -> Callable[[int], torch.Tensor]:
    """Of so many places or tokens those where each rank acts, ones in [rows, count, R]."""
    everywhere = -1
    regions = [
        [
            everywhere if one.region is None else one.region
            for one in side
            for _ in range(len(one.down))
        ]
        for side in rows
    ]
    home = torch.tensor(_padded(regions, everywhere), device=_device(rows)).unsqueeze(1)

    def owners(layout: Layout | None, count: int) -> torch.Tensor:
        if layout is None:
            return torch.full((count,), everywhere, device=home.device)
        return layout.tokens if of_text else layout.places(count)

    def inside(count: int) -> torch.Tensor:
        owner = torch.stack([owners(layout, count) for layout in layouts]).unsqueeze(2)
        return (owner == home) | (home == everywhere)

    return inside


def _padded(rows: list[list[Any]], filling: Any) -> list[list[Any]]:
    width = max(len(row) for row in rows)
    return [row + [filling] * (width - len(row)) for row in rows]


def _device(rows: Sequence[Sequence[Worn]]) -> torch.device:
    return next(one.down.device for side in rows for one in side)
