"""TIES: trim, elect a sign, merge those that agree. Torch.

Yadav et al. 2023 (arXiv 2306.01708), per weight matrix: of each delta the largest entries by
magnitude stay; each entry's sign is that of the sum over all deltas; the entries of that sign are
averaged. The result has full rank: `low_rank.compress` makes a LoRA of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """From deltas of one shape, the part `density` of whose entries stays, 0 < density <= 1.

    The weights count before the vote, so that a negative one turns its delta's signs round.
    Raises ValueError where the numbers of deltas and weights differ, or for another density.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, which must be above 0 and at most 1")
    trimmed = torch.stack(
        [weight * _trim(delta, density) for weight, delta in zip(weights, deltas, strict=True)]
    )
    elected = trimmed.sum(0).sign()
    agreeing = trimmed.sign() == elected
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _trim(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its largest entries set to zero."""
    kept = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
    mask = torch.zeros_like(delta).flatten()
    mask[kept] = 1
    return delta * mask.view_as(delta)
