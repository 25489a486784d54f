"""What the base's autoencoder sees in photos, computed once. Imports torch.

The encoder gives a Gaussian per pixel (Kingma & Welling 2014): its mean and standard deviation are
kept, and each training step draws from it, as an encoder run in every step would.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

from lookalike_datasets.features import cache
from lookalike_datasets.features.views import Cut, Photo

_BATCH_PIXELS = 2**20


@dataclass(frozen=True)
class Moments:
    """Of one view of a photo. mean, std: [channels, height, width], unscaled.

    mask: [1, height, width] in 0..1, how much of each place is to be learned; None: all of it.
    """

    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor | None = None


def moments(
    views: Sequence[tuple[Photo, Cut]],
    load_vae: Callable[[], Any],
    vae_digest: str,
    folder: Path,
) -> list[Moments]:
    """Moments of views of photos, from the cache where it has them.

    Args:
        load_vae: called (once, and only on a miss) for the AutoencoderKL.
        folder: of the cache.
    """
    keys = [
        cache.key_of(image=photo.sha256, vae=vae_digest, cut=asdict(cut), version=2)
        for photo, cut in views
    ]
    found = [cache.read(folder, key) for key in keys]
    missing = defaultdict(list)  # of each size in pixels
    for i, tensors in enumerate(found):
        if tensors is None:
            missing[views[i][1].width, views[i][1].height].append(i)
    vae = load_vae() if missing else None
    for (width, height), places in missing.items():
        at_once = max(1, _BATCH_PIXELS // (width * height))
        for start in range(0, len(places), at_once):
            batch = places[start : start + at_once]
            for i, tensors in zip(batch, _encoded(vae, [views[i] for i in batch]), strict=True):
                found[i] = tensors
                cache.write(folder, keys[i], tensors)
    return [Moments(**tensors) for tensors in found if tensors is not None]


def encode(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [n, channels, h, w] on the CPU of pixels [n, 3, H, W]."""
    with torch.inference_mode():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean.float().cpu().clone(), posterior.std.float().cpu().clone()


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The middle of a picture as a square of `resolution` pixels."""
    return Cut(resolution, resolution).show(image)[0]


def to_pixels(image: Image.Image) -> torch.Tensor:
    """[3, H, W] in [-1, 1] of an RGB picture."""
    values = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()
    return values / 127.5 - 1


def _encoded(vae: Any, views: list[tuple[Photo, Cut]]) -> list[dict[str, torch.Tensor]]:
    """What the cache keeps of views of one size."""
    shown = []
    for photo, cut in views:
        with Image.open(photo.path) as image:
            shown.append(cut.show(image))
    mean, std = encode(vae, torch.stack([to_pixels(picture) for picture, _ in shown]))
    kept = [{"mean": m, "std": s} for m, s in zip(mean, std, strict=True)]
    for tensors, (_, mask) in zip(kept, shown, strict=True):
        if mask is not None:
            whole = torch.from_numpy(numpy.array(mask)).float()[None] / 255
            tensors["mask"] = F.adaptive_avg_pool2d(whole, (mean.shape[-2], mean.shape[-1]))
    return kept
