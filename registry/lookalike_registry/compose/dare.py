"""DARE-linear: drop entries at random, rescale the rest, add up. Torch.

Yu et al. 2023 (arXiv 2311.03099): each entry of a delta stays with probability `density` and is
then divided by it, which keeps the expectation and thins out collisions between deltas. The result
has full rank: `low_rank.compress` makes a LoRA of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def dare_linear(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, draws: torch.Generator
) -> Tensor:
    """From deltas of one shape, drawing in their order; 0 < density <= 1.

    One seeded generator for all layers of a merge makes the merge repeatable. Raises ValueError
    where the numbers of deltas and weights differ, or for another density.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, which must be above 0 and at most 1")
    total = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        stays = torch.bernoulli(torch.full_like(delta, density), generator=draws)
        total += weight * delta * stays / density
    return total
