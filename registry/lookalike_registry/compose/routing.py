"""SSR-Merge: many LoRAs in one, each answering to its own signal. Torch.

Wei et al. 2026 (arXiv 2606.10617). All A_k stacked, the shared signal of an input x is z = A x. A
router R between A and B = [B_1 B_2 …] is to send subject k's inputs X_k through B_k alone:

    minimise  sum_k ||R Z_k - H_k||²,   Z_k = A X_k,  H_k = Z_k with the others' rows set to zero
    R = Q G^-1,   G = sum_k Z_k Z_k^T,   Q = sum_k H_k Z_k^T

and is absorbed into B R, so that the merged LoRA costs what the plain sum does. G and Q are sums:
inputs are met in any order and forgotten.

Subjects share most of their signal (background, the words of a scene), and a few scenes are all
that is heard: alone, this enlarges what tells them apart by chance, sixfold in K and V of the
bundled base. So R is held near the plain sum, which is R = I, by ridge ||(R - I) D^½||², D being
G's diagonal (so that no LoRA's split of its scale over A and B matters):

    R = (Q + ridge D) (G + ridge D)^-1
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lookalike_registry.compose.low_rank import LowRank

RIDGE = 1e-2


class Router:
    """One layer's merge: `observe` every subject, then `merged`."""

    def __init__(self, pairs: Sequence[LowRank], ridge: float = RIDGE) -> None:
        """`pairs`: each subject's up [out, r_k] and down [r_k, in…] in this layer."""
        self._pairs, self._ridge = pairs, ridge
        self._down = torch.cat([pair.down for pair in pairs])
        ends = torch.tensor([len(pair.down) for pair in pairs]).cumsum(0).tolist()
        self._rows = [slice(end - len(p.down), end) for end, p in zip(ends, pairs, strict=True)]
        self._gram = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)  # G
        self._guide = torch.zeros_like(self._gram)  # Q
        self._unheard = set(range(len(pairs)))

    def observe(self, subject: int, inputs: Tensor) -> None:
        """Meet the layer's inputs [..., in] from a run with only this subject's LoRA loaded.

        For a convolution, the patches under its kernel, [..., in * k * k].
        """
        signal = inputs.double().flatten(0, -2) @ self._down.double().flatten(1).T  # Z^T
        self._gram += signal.T @ signal
        self._guide[self._rows[subject]] += signal[:, self._rows[subject]].T @ signal
        self._unheard.discard(subject)

    def merged(self) -> LowRank:
        """The one LoRA for all subjects; its rank is the sum of theirs.

        Raises ValueError when a subject was never observed: the router would silence it.
        """
        if self._unheard:
            raise ValueError(f"subjects {sorted(self._unheard)} were not observed")
        scale = self._gram.diagonal()
        near = torch.where(scale > 0, self._ridge * scale, 1.0).diag()  # a dead row of A stays dead
        router = torch.linalg.solve(self._gram + near, self._guide + near, left=False)
        up = torch.cat([pair.up for pair in self._pairs], dim=1)
        return LowRank((up.double() @ router).to(up.dtype), self._down)
