"""Prior images: what the frozen base draws for the class noun alone. Imports torch.

They are known by what decides them, base, prompt, sampler and seed, never by how many files lie in
a folder: image i has the seed `seed + i`, so asking for more keeps those that are there, and
another prompt never finds them.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookalike_datasets.features import cache
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.files import atomic_write, sha256_file
from lookalike_platform.samplers import make_sampler

_AT_ONCE = 8


@dataclass(frozen=True)
class PriorImages:
    """Files (PNG, lossless) and the sha256 of each."""

    paths: list[Path]
    digests: list[str]


@dataclass(frozen=True)
class PriorRequest:
    """What decides the images. `resolution` in pixels; image i starts from seed + i."""

    base_fingerprint: str
    prompt: str
    sampler: str
    steps: int
    guidance_scale: float
    seed: int
    resolution: int
    count: int


def prior_images(
    request: PriorRequest,
    load_parts: Callable[[], Any],
    folder: Path,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> PriorImages:
    """The images asked for, drawn where they are not there yet.

    Args:
        load_parts: called only when images are missing, for an object with `unet`, `vae`,
            `scheduler`, `encode(prompts, resolution)` and `blank(resolution)`, as `BaseParts`.
        on_image: called with (images there, images wanted).
    """
    paths = [_path(request, i, folder) for i in range(request.count)]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        parts = load_parts()
        text = parts.encode([request.prompt], request.resolution)
        blank = parts.blank(request.resolution)
        scale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        side = request.resolution // scale
        for start in range(0, len(missing), _AT_ONCE):
            batch = missing[start : start + _AT_ONCE]
            seeds = [request.seed + i for i in batch]
            latents, generators = noise(seeds, parts.vae.config.latent_channels, side, side)
            latents = denoise(
                parts.unet,
                make_sampler(request.sampler, dict(parts.scheduler.config)),
                latents.to(parts.unet.device, parts.unet.dtype),
                generators,
                text,
                blank,
                steps=request.steps,
                guidance_scale=request.guidance_scale,
            )
            for i, picture in zip(batch, decode(parts.vae, latents), strict=True):
                _save(picture, paths[i])
            on_image(request.count - len(missing) + start + len(batch), request.count)
    return PriorImages(paths, [sha256_file(path) for path in paths])


def _path(request: PriorRequest, number: int, folder: Path) -> Path:
    key = cache.key_of(
        base=request.base_fingerprint,
        prompt=request.prompt,
        sampler=request.sampler,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed + number,
        resolution=request.resolution,
        version=1,
    )
    return folder / key[:2] / f"{key}.png"


def _save(picture: Any, path: Path) -> None:
    """Two runs may draw the same picture at once."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    atomic_write(path, data.getvalue())
