"""Pictures that a base in memory paints, with whatever it wears. Torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_trainers.base_parts import BaseParts

_AT_ONCE = 8


@dataclass(frozen=True)
class Style:
    """How pictures are sampled."""

    sampler: str = "dpmsolver++"
    steps: int = 20
    guidance_scale: float = 4.0


STYLE = Style()


def paint(
    parts: BaseParts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    style: Style = STYLE,
    on_picture: Callable[[int], object] = lambda done: None,
) -> list[list[Image.Image]]:
    """Of each prompt one picture a seed. The same seed starts from the same noise everywhere.

    Args:
        on_picture: called with how many are painted, after each batch; may raise to stop.
    """
    painted: list[list[Image.Image]] = []
    for prompt in prompts:
        pictures: list[Image.Image] = []
        for start in range(0, len(seeds), _AT_ONCE):
            pictures += _batch(parts, prompt, seeds[start : start + _AT_ONCE], resolution, style)
            on_picture(len(painted) * len(seeds) + len(pictures))
        painted.append(pictures)
    return painted


@torch.inference_mode()
def _batch(
    parts: BaseParts, prompt: str, seeds: Sequence[int], resolution: int, style: Style
) -> list[Image.Image]:
    unet, vae = parts.unet, parts.vae
    side = resolution // parts.vae_scale
    latents, generators = noise(seeds, unet.config.in_channels, side, side)
    latents = denoise(
        unet,
        make_sampler(style.sampler, dict(parts.scheduler.config)),
        latents.to(parts.device),
        generators,
        parts.encode([prompt], resolution),
        parts.blank(resolution),
        steps=style.steps,
        guidance_scale=style.guidance_scale,
    )
    return decode(vae, latents)
