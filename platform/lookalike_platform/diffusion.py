"""The sampling loop: from noise to pictures, with classifier-free guidance. Imports torch.

Shared by the sampler process, the prior images and the sample grid of a training run, so that a
picture drawn by one is the picture drawn by the others.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from PIL import Image

from lookalike_platform.conditioning import Text, predict


def noise(
    seeds: Sequence[int], channels: int, height: int, width: int
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Starting noise [images, channels, height, width] and the generators that go on from it.

    Each image draws from its own generator, so it does not depend on its batch mates. They live on
    the CPU: the same seed gives the same noise on every device.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    drawn = [torch.randn((1, channels, height, width), generator=g) for g in generators]
    return torch.cat(drawn), generators


def denoise(
    unet: Any,
    sampler: Any,
    latents: torch.Tensor,
    generators: list[torch.Generator],
    text: Text,
    blank: Text,
    *,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None] = lambda step: None,
) -> torch.Tensor:
    """Latents without noise, of the shape of `latents` (unit Gaussian noise).

    Args:
        sampler: a fresh diffusers scheduler; it has state.
        text, blank: prompt and negative prompt, one for each image or one for all.
        on_step: called with the number of steps done after each; may raise to stop.
    """
    count = len(latents)
    sampler.set_timesteps(steps, device=latents.device)
    step_noise = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        step_noise["generator"] = generators

    latents = latents * sampler.init_noise_sigma
    guided = guidance_scale != 1.0
    condition = text.expand(count)
    if guided:
        condition = Text.cat([blank.expand(count), condition])

    for number, timestep in enumerate(sampler.timesteps):
        seen = torch.cat([latents, latents]) if guided else latents
        seen = sampler.scale_model_input(seen, timestep)
        predicted = predict(unet, seen, timestep, condition)
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = guide(unconditional, conditional, guidance_scale)
        latents = sampler.step(predicted, timestep, latents, return_dict=False, **step_noise)[0]
        # Some samplers (second order ones) visit more timesteps than steps.
        on_step(min(number + 1, steps))
    return latents


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) e(z, c) - w e(z) for a
    guidance scale of 1 + w, as diffusers counts it."""
    return unconditional + scale * (conditional - unconditional)


def decode(vae: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents: the autoencoder's [-1, 1] rounded to 8 bits."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    pixels = vae.decode(scaled, return_dict=False)[0]
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(numpy.round(picture * 255).astype(numpy.uint8)) for picture in pixels]
