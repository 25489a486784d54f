"""From a scene to its pictures, a batch at a time. Imports torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from lookalike_api.sampling.models import ResidentBase
from lookalike_platform.conditioning import Text
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler

# Pictures made at once hold about this many pixels: 16 of 256 x 256, or 4 of 512 x 512.
BATCH_PIXELS = 2**20


@dataclass(frozen=True)
class Scene:
    """What to paint: prompt and negative prompt, one row each; width and height in pixels.

    Image i starts from the noise of seed `seed + i`.
    """

    text: Text
    blank: Text
    guidance_scale: float
    steps: int
    sampler: str
    seed: int
    width: int
    height: int
    num_images: int


def paint(
    base: ResidentBase, scene: Scene, on_step: Callable[[int, int], None]
) -> list[Image.Image]:
    """The scene's pictures.

    Args:
        on_step: called with (steps done, steps in all) after each step; what it raises ends it.
    """
    at_once = max(1, BATCH_PIXELS // (scene.width * scene.height))
    batches = [
        range(first, min(first + at_once, scene.num_images))
        for first in range(0, scene.num_images, at_once)
    ]
    total = scene.steps * len(batches)
    pictures: list[Image.Image] = []
    height, width = scene.height // base.vae_scale, scene.width // base.vae_scale
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            drawn, generators = noise([scene.seed + i for i in batch], base.channels, height, width)
            latents = denoise(
                base.unet,
                make_sampler(scene.sampler, base.scheduler_config),
                drawn.to(base.device, base.dtype),
                generators,
                scene.text,
                scene.blank,
                steps=scene.steps,
                guidance_scale=scene.guidance_scale,
                on_step=partial(_count, on_step, number * scene.steps, total),
            )
            pictures += decode(base.vae, latents)
    return pictures


def _count(on_step: Callable[[int, int], None], before: int, total: int, step: int) -> None:
    on_step(before + step, total)
