"""Fusion of several concepts' weights in one linear layer by ridge least squares. Torch.

Mix-of-Show (Gu et al. 2023, arXiv 2305.18292), "gradient fusion": find the W that answers each
concept i's inputs X_i as that concept's own weights W_i do,

    minimise  sum_i ||W X_i - W_i X_i||² + ridge ||W - W0||²
    W = W0 + (sum_i (W_i - W0) G_i) (sum_i G_i + ridge I)^-1,   G_i = X_i X_i^T

The published code descends by L-BFGS; the minimum is this formula. Of the inputs only the sums G_i
are kept, so that they may stream by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-6  # of the inputs' mean square; what no concept ever sent in stays as in W0


def gram(inputs: Tensor) -> Tensor:
    """G [in, in] float64 of inputs [..., in]; add up those of several batches."""
    rows = inputs.double().flatten(0, -2)
    return rows.T @ rows


def fuse(base: Tensor, tuned: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """W [out, in] in the dtype of `base`, from W0, each concept's W_i [out, in] and G_i [in, in].

    Raises ValueError where the numbers of weights and Grams differ.
    """
    before = base.double()
    asked = torch.zeros_like(before)
    for weight, seen in zip(tuned, grams, strict=True):
        asked += (weight.double() - before) @ seen
    total = torch.stack(list(grams)).sum(0)
    total.diagonal().add_(RIDGE * total.diagonal().mean())
    return (before + torch.linalg.solve(total, asked, left=False)).to(base.dtype)
