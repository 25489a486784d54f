"""Fusion of several concepts' LoRAs in one layer by ridge least squares. Torch.

Mix-of-Show (Gu et al. 2023, arXiv 2305.18292), "gradient fusion": find the W that answers each
concept i's inputs X_i as that concept's own weights W_i = W0 + B_i A_i do,

    minimise  sum_i ||W X_i - W_i X_i||² + ridge ||W - W0 - sum_i B_i A_i||²
    W = W0 + (sum_i B_i A_i (G_i + ridge I)) (G + ridge I)^-1,   G_i = X_i X_i^T,   G = sum_i G_i

The published code descends by L-BFGS from W0 and ends after a few rounds; the minimum is this
formula, and a product again:

    B = [B_1 B_2 …],   A = [A_1 (G_1 + ridge I); A_2 (G_2 + ridge I); …] (G + ridge I)^-1

Concepts ask for different answers to nearly the same inputs: without a ridge the minimum has
weights a hundred times as large as theirs. With it, what tells them apart too little to go by, and
what none of them ever sent in, is answered as by the plain sum; one concept alone stays as it is.

Only G [in, in] and the A_i G_i [r_i, in] are kept, so that inputs may stream by, and nothing is
multiplied out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lookalike_registry.compose.low_rank import LowRank

RIDGE = 1e-1  # of the inputs' mean square


class Fusion:
    """One layer's merge: `observe` every concept, then `merged`."""

    def __init__(self, pairs: Sequence[LowRank], ridge: float = RIDGE) -> None:
        """`pairs`: each concept's up [out, r_i] and down [r_i, in…] in this layer."""
        self._pairs, self._ridge = pairs, ridge
        self._shape = pairs[0].down.shape[1:]
        width = self._shape.numel()
        self._gram = torch.zeros(width, width, dtype=torch.float64)  # G
        self._asked = [
            torch.zeros(len(pair.down), width, dtype=torch.float64) for pair in pairs
        ]  # A_i G_i
        self._unheard = set(range(len(pairs)))

    def observe(self, concept: int, inputs: Tensor) -> None:
        """Meet the layer's inputs [..., in] from a run with only this concept's LoRA loaded.

        For a convolution, the patches under its kernel, [..., in * k * k].
        """
        rows = inputs.double().flatten(0, -2)  # X_i^T
        self._gram.addmm_(rows.T, rows)
        down = self._pairs[concept].down.double().flatten(1)
        self._asked[concept] += (down @ rows.T) @ rows
        self._unheard.discard(concept)

    def merged(self) -> LowRank:
        """The one LoRA for all concepts; its rank is the sum of theirs.

        Raises ValueError when a concept was never observed: its outputs would count for nothing.
        """
        if self._unheard:
            raise ValueError(f"concepts {sorted(self._unheard)} were not observed")
        heard = self._gram.diagonal().mean()
        ridge = self._ridge * heard if heard > 0 else 1.0  # of silence: the plain sum
        total = self._gram.clone()
        total.diagonal().add_(ridge)
        downs = [pair.down.double().flatten(1) for pair in self._pairs]
        asked = [own + ridge * down for own, down in zip(self._asked, downs, strict=True)]
        down = torch.linalg.solve(total, torch.cat(asked), left=False)
        up = torch.cat([pair.up for pair in self._pairs], dim=1)
        return LowRank(up, down.to(up.dtype).unflatten(1, self._shape))
