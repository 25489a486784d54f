"""Adapters of random weights on tiny bases, painted by this project and by plain diffusers."""

from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_registry.formats.export import Exported, export
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.methods.find import builder_of, wear_of
from lookalike_trainers.methods.method import Card
from support_models import RESOLUTION, VAE_SCALE

SIDE = RESOLUTION // VAE_SCALE
STEPS, SEED, GUIDANCE = 3, 5, 3.0


def saved(base: Path, folder: Path, method: str, **config: Any) -> Path:
    """An adapter file of the method, all of whose trainables are somewhere else than at start."""
    info = next(info for info in METHODS if info.name == method)
    whole = info.config(resolution=RESOLUTION, initializer="dog", **config)
    parts = BaseParts(base, torch.device("cpu"))
    if whole.token_vectors:
        parts.learn(whole.trigger, whole.token_vectors)
    torch.manual_seed(0)
    made = builder_of(method)(parts, whole)
    for parameter in made.module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    folder.mkdir(exist_ok=True)
    return made.save(folder, Card("robot", base.name, RESOLUTION, "sks", "epsilon"))


def pipeline(base: Path) -> Any:
    kind = StableDiffusionXLPipeline if base.name == "sdxl" else StableDiffusionPipeline
    made = kind.from_pretrained(base)
    made.set_progress_bar_config(disable=True)
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config)
    return made


def diffusers_paints(pipe: Any, prompt: str) -> numpy.ndarray:
    picture = pipe(
        prompt,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    return numpy.asarray(picture, dtype=int)


def we_paint(base: Path, prompt: str, method: str = "", file: Path | None = None) -> numpy.ndarray:
    """With the adapter file worn under the word sks."""
    parts = BaseParts(base, torch.device("cpu"))
    if file:
        wear_of(method)(parts, file, 1.0, "sks")
    with torch.inference_mode():
        start, generators = noise([SEED], 4, SIDE, SIDE)
        latents = denoise(
            parts.unet,
            make_sampler("ddim", dict(parts.scheduler.config)),
            start,
            generators,
            parts.encode([prompt], RESOLUTION),
            parts.blank(RESOLUTION),
            steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        (picture,) = decode(parts.vae, latents)
    return numpy.asarray(picture, dtype=int)


def same(one: numpy.ndarray, other: numpy.ndarray) -> bool:
    return int(numpy.abs(one - other).max()) <= 1


def exported(file: Path, base: Path, form: str, folder: Path, rank: int | None = None) -> Exported:
    folder.mkdir(exist_ok=True)
    return export(file, base, form, base.name, folder, rank)
