"""What the base's autoencoder sees in photos, computed once. Imports torch.

The encoder gives a Gaussian per pixel (Kingma & Welling 2014): its mean and standard deviation are
kept, and each training step draws from it, as an encoder run in every step would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps

from lookalike_datasets.features import cache

_BATCH_PIXELS = 2**20


@dataclass(frozen=True)
class Moments:
    """mean, std: [views, channels, height, width], unscaled. Views of photo i start at i * flips.

    flips: 1, or 2 where each photo is followed by its mirror image.
    """

    mean: torch.Tensor
    std: torch.Tensor
    flips: int


def photo_moments(
    paths: Sequence[Path],
    digests: Sequence[str],
    load_vae: Any,
    vae_digest: str,
    resolution: int,
    flip: bool,
    folder: Path,
) -> Moments:
    """Moments of photos, from the cache where it has them.

    Args:
        digests: sha256 of each file's bytes.
        load_vae: called (once, and only on a miss) for the AutoencoderKL.
        resolution: side in pixels of the square that is cut from the middle of each photo.
        folder: of the cache.
    """
    views = [(p, d, mirrored) for p, d in zip(paths, digests, strict=True) for mirrored in _m(flip)]
    keys = [
        cache.key_of(image=d, vae=vae_digest, resolution=resolution, mirrored=m, version=1)
        for _, d, m in views
    ]
    found = [cache.read(folder, key) for key in keys]
    missing = [i for i, tensors in enumerate(found) if tensors is None]
    if missing:
        vae = load_vae()
        at_once = max(1, _BATCH_PIXELS // resolution**2)
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            pixels = torch.stack([_pixels(views[i][0], resolution, views[i][2]) for i in batch])
            mean, std = encode(vae, pixels)
            for i, m, s in zip(batch, mean, std, strict=True):
                found[i] = {"mean": m, "std": s}
                cache.write(folder, keys[i], {"mean": m, "std": s})
    whole = [tensors for tensors in found if tensors is not None]
    return Moments(
        torch.stack([t["mean"] for t in whole]),
        torch.stack([t["std"] for t in whole]),
        flips=2 if flip else 1,
    )


def encode(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [n, channels, h, w] on the CPU of pixels [n, 3, H, W]."""
    with torch.inference_mode():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean.float().cpu().clone(), posterior.std.float().cpu().clone()


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The middle of a picture as a square of `resolution` pixels."""
    side = (resolution, resolution)
    return ImageOps.fit(image.convert("RGB"), side, Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """[3, H, W] in [-1, 1] of an RGB picture."""
    values = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()
    return values / 127.5 - 1


def _pixels(path: Path, resolution: int, mirrored: bool) -> torch.Tensor:
    with Image.open(path) as image:
        cut = square(image, resolution)
    return to_pixels(ImageOps.mirror(cut) if mirrored else cut)


def _m(flip: bool) -> tuple[bool, ...]:
    return (False, True) if flip else (False,)
