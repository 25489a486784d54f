"""The figures behind the bars: pure functions of tensors."""

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures: 10 log10(4 / MSE), in dB, of ``a`` and ``b`` [B, 3, H, W] on [-1, 1]."""
    error = (a - b).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def top_k(logits: Tensor, wanted: Tensor, k: int) -> float:
    """Share of rows of ``logits`` [B, C] whose ``wanted`` [B] class is among the k largest."""
    return float((logits.topk(k, dim=1).indices == wanted[:, None]).any(1).float().mean())


def all_in_top_k(logits: Tensor, wanted: Tensor, k: int) -> float:
    """Share of rows whose every wanted class, ``wanted`` [B, M], is among the k largest."""
    best = logits.topk(k, dim=1).indices
    found = (best[:, None, :] == wanted[:, :, None]).any(2)
    return float(found.all(1).float().mean())
