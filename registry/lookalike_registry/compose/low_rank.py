"""A weight change as a product of two thin matrices: truncated SVD. Torch.

Eckart and Young 1936: the best rank-r answer to dW = U S V^T keeps its r largest singular triplets.
Compresses Custom Diffusion (the first i whose singular values sum to 60%) and extracts a LoRA of
rank r from what DreamBooth changed.

Of U, S, V only the side of the smaller dimension m is computed, from the eigenvectors of the m x m
Gram matrix in float64; the other side is a projection of dW itself. That is several times faster
than an SVD, and exact to about 1e-8 of the largest singular value: less than float32 can hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = 1e-7  # of the largest singular value: below it a direction is rounding


@dataclass(frozen=True)
class LowRank:
    """dW ≈ up @ down: a LoRA pair (B, A) with its scale alpha / r multiplied in."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in] or [r, in, k, k]
    error: float = 0.0  # ||dW - up down|| / ||dW||, Frobenius, of the halves as they are stored

    def dense(self) -> Tensor:
        """up @ down, [out, in] or [out, in, k, k]."""
        return (self.up @ self.down.flatten(1)).unflatten(1, self.down.shape[1:])


def compress(delta: Tensor, *, rank: int | None = None, share: float | None = None) -> LowRank:
    """The best approximation of `delta` [out, in] or [out, in, k, k], in its dtype.

    Each half carries the root of the singular values, so that both fit in float16.
    Give one of: `rank`, how many directions to keep (all, if there are fewer), or `share`, the part
    of the sum of all singular values that the kept ones are to reach. Raises ValueError otherwise,
    and unless rank >= 1 and 0 < share <= 1.
    """
    if (rank is None) == (share is None):
        raise ValueError("give either rank or share")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, which must be at least 1")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}, which must be above 0 and at most 1")
    matrix = delta.double().flatten(1)
    wide = len(matrix) <= matrix.shape[1]
    side, values = _left_singular(matrix if wide else matrix.T)
    if share is not None:
        reached = values.cumsum(0)
        rank = int((reached < share * reached[-1]).sum()) + 1
    side, values = side[:, :rank], values[:rank]
    # U sqrt(S), and U^T dW / sqrt(S) = sqrt(S) V^T; where dW has no direction, both are zero.
    root = values.sqrt()
    small = side * root
    other = (side * torch.where(root > 0, 1 / root, 0.0)).T @ (matrix if wide else matrix.T)
    up, down = (small, other) if wide else (other.T, small.T)
    up, down = up.to(delta.dtype).contiguous(), down.to(delta.dtype).contiguous()
    size = float(matrix.norm())
    error = float((matrix - up.double() @ down.double()).norm()) / size if size else 0.0
    return LowRank(up, down.unflatten(1, delta.shape[1:]), error)


def shorten(pair: LowRank, *, rank: int | None = None, share: float | None = None) -> LowRank:
    """`pair` with a smaller rank, as `compress` would find it, without making it dense.

    With thin QRs up = Q_u R_u and down^T = Q_d R_d, the singular values of up @ down are those of
    the small core R_u R_d^T. Raises what `compress` raises.
    """
    up, down = pair.up.double(), pair.down.double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    core = compress(r_up @ r_down.T, rank=rank, share=share)
    short_up = (q_up @ core.up).to(pair.up.dtype)
    short_down = (core.down @ q_down.T).to(pair.down.dtype)
    left = torch.cat([up, -short_up.double()], dim=1), torch.cat([down, short_down.double()])
    size = _norm(up, down)
    error = _norm(*left) / size if size else 0.0
    return LowRank(short_up, short_down.unflatten(1, pair.down.shape[1:]), error)


def _norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||, from the two r x r Gram matrices."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [m, m] and values [m], largest first, of [m, n] with m <= n."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values = squares.clamp(min=0).sqrt().flip(0)
    return vectors.flip(1), torch.where(values > NOTHING * values[0], values, 0.0)
