"""The plain sum of several LoRAs: w_1 B_1 A_1 + w_2 B_2 A_2 + … Torch.

It is itself a LoRA, whose rank is the sum of theirs: exact, nothing is multiplied out.
`low_rank.shorten` makes the SVD merge of it.
"""

from collections.abc import Sequence

import torch

from lookalike_registry.compose.low_rank import LowRank


def weighted_sum(pairs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Of pairs for one layer, each up [out, r_i] and down [r_i, in…], with one weight each.

    Raises ValueError where the numbers of pairs and weights differ.
    """
    scaled = [weight * pair.up for weight, pair in zip(weights, pairs, strict=True)]
    return LowRank(torch.cat(scaled, dim=1), torch.cat([pair.down for pair in pairs]))
