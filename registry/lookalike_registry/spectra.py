"""SVDiff's spectra: a weight's factors, and what a shift of its singular values makes of it. Torch.

    W = U diag(S) V^T,    W' = U diag(relu(S + delta)) V^T        (Han et al. 2023, eq. 3)

Adapter files hold delta alone, `spectrum.<part>.<parameter>`; U, S and V^T are the base's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from lookalike_datasets.features import cache
from lookalike_platform.files import sha256_bytes

PREFIX = "spectrum."
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shifted(keys: Iterable[str]) -> set[str]:
    """The weights whose spectra an adapter file shifts."""
    return {key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)}


def changed(
    tensors: Mapping[str, torch.Tensor],
    scale: float,
    weights: Mapping[str, torch.Tensor],
    cache: Path | None,
) -> dict[str, torch.Tensor]:
    """W' - W of `scale` times each spectrum's shift, by keys of adapter files.

    Args:
        weights: the base's own, float32, by `<part>.<parameter>`.
    """
    changes = {}
    for key, delta in tensors.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            u, s, vt = decompose(weights[name], cache)
            change = recompose(u, s, vt, delta.to(s.device) * scale)
            changes[f"delta.{name}"] = change.view_as(weights[name])
    return changes


def recompose(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """W' - W = U diag(relu(S + delta) - S) V^T, [out, in], in the factors' precision."""
    scaled = u * (F.relu(s + delta) - s)  # S and delta are float32 where U and V^T are bf16
    return scaled.to(vt.dtype) @ vt


def decompose(weight: torch.Tensor, kept: Path | None) -> Factors:
    """U [out, r], S [r] and V^T [r, in] of a weight [out, in, …], float32.

    In float64, so that a file means the same on every machine: neighbouring singular vectors mix
    by the rounding error over the gap between their values. On SD 1.5 it takes minutes on two
    cores, and once, and then 5 GB in the cache.

    Args:
        kept: the folder of caches, where the weight's factors lie under its content.
    """
    matrix = weight.detach().flatten(1)
    if kept is None:
        return _svd(matrix)
    content = matrix.float().cpu().contiguous().numpy().tobytes()
    key = cache.key_of(svd=sha256_bytes(content), shape=list(matrix.shape), version=1)
    found = cache.read(kept / "svd", key)
    if found is None:
        found = dict(zip(("u", "s", "vt"), _svd(matrix), strict=True))
        cache.write(kept / "svd", key, found)
    u, s, vt = (found[name].to(weight.device) for name in ("u", "s", "vt"))
    return u, s, vt


def _svd(matrix: torch.Tensor) -> Factors:
    """By QR of the longer side first: LAPACK's SVD of the small R is many times faster."""
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr((matrix.T if wide else matrix).double())
    inner, s, right = torch.linalg.svd(r)
    left = q @ inner
    u, vt = (right.T, left.T) if wide else (left, right)
    return u.float().contiguous(), s.float(), vt.float().contiguous()
