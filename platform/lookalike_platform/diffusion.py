"""From noise to pictures, with classifier-free guidance. Imports torch.

`denoise` is the loop for prior images, sample grids and evaluations. The sampler process has one of
its own, for many requests at once, and shares all that it is made of: the noise, the steps
(walk.py) and the autoencoder. So a picture drawn by one is the picture drawn by the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from PIL import Image

from lookalike_platform.conditioning import Text, predict
from lookalike_platform.guidance import Guidance
from lookalike_platform.walk import Walk


def noise(
    seeds: Sequence[int], channels: int, height: int, width: int
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Starting noise [images, channels, height, width] and the generators that go on from it.

    Each image draws from its own generator, so it does not depend on its batch mates. They live on
    the CPU: the same seed gives the same noise on every device.
    """
    generators = generators_of(seeds)
    return draw(generators, channels, height, width), generators


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(generators: list[torch.Generator], channels: int, height: int, width: int) -> torch.Tensor:
    """Unit Gaussian noise [generators, channels, height, width]."""
    return torch.cat([torch.randn((1, channels, height, width), generator=g) for g in generators])


def denoise(
    unet: Any,
    sampler: Any,
    noise: torch.Tensor,
    generators: list[torch.Generator],
    text: Text,
    blank: Text,
    *,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> torch.Tensor:
    """Latents without noise, of the shape of `noise` (unit Gaussian).

    Args:
        sampler: a fresh diffusers scheduler; it has state.
        text, blank: prompt and negative prompt, one for each image or one for all.
        on_step: called with (steps done, steps in all) after each; may raise to stop.
    """
    guidance = Guidance(scale=guidance_scale)
    return walk_on(
        Walk(sampler, noise, generators, steps=steps, guidance=guidance), unet, text, blank, on_step
    )


def walk_on(
    walk: Walk,
    unet: Any,
    text: Text,
    blank: Text,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> torch.Tensor:
    """The latents at the end of the walk; arguments as for `denoise`."""
    text, blank = text.expand(len(walk.latents)), blank.expand(len(walk.latents))
    both = Text.cat([blank, text])
    while not walk.done:
        seen, timesteps = walk.ask()
        if walk.guided:
            seen, timesteps = torch.cat([seen, seen]), torch.cat([timesteps, timesteps])
            unconditional, conditional = predict(unet, seen, timesteps, both).chunk(2)
            walk.answer(conditional, unconditional)
        else:
            walk.answer(predict(unet, seen, timesteps, text))
        on_step(walk.count, walk.total)
    return walk.latents


def decode(vae: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents: the autoencoder's [-1, 1] rounded to 8 bits."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    pixels = vae.decode(scaled, return_dict=False)[0]
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(numpy.round(picture * 255).astype(numpy.uint8)) for picture in pixels]


def encode_picture(
    vae: Any, picture: Image.Image, generators: list[torch.Generator]
) -> torch.Tensor:
    """Latents [generators, channels, height, width] of an RGB picture, a draw for each generator
    from what the autoencoder says of it; the first that a generator is used for, as in diffusers.
    """
    pixels = torch.from_numpy(numpy.array(picture, numpy.float32) / 255).permute(2, 0, 1)[None]
    said = vae.encode((pixels * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    drawn = torch.cat([said.sample(generator) for generator in generators])
    return vae.config.scaling_factor * drawn
