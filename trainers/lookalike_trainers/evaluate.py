"""A finished adapter, tried: put on the base again from its file, and made to paint. Torch.

The grid shows what it learned: one row a prompt, the base for the plain class noun at the left, the
adapter at the right, both from the same noise.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import RunRequest, TrainingConfig
from lookalike_trainers.methods.find import wear_of

SCENES = ("a {}", "a {} on a green background", "a {} on the beach", "a {} in the snow")
SEEDS = (11, 12)
STEPS = 20
GUIDANCE = 4.0
_TEXT_HEIGHT = 14


def draw_samples(
    request: RunRequest,
    config: TrainingConfig,
    adapter: Path,
    device: torch.device,
    say: Callable[[dict[str, object]], None],
) -> Path:
    """Draw the grid as `samples.png` beside the adapter file; single images in `samples/`."""
    parts = BaseParts(request.base_folder, device)
    subject = f"{config.trigger} {request.class_noun}"
    columns: dict[str, list[list[Image.Image]]] = {"base": [], "adapter": []}
    for column, words in (("base", request.class_noun), ("adapter", subject)):
        if column == "adapter":
            wear_of(request.method)(parts, adapter, 1.0, config.trigger)
        for number, scene in enumerate(SCENES):
            columns[column].append(_paint(parts, scene.format(words), config, device))
            say({"type": "sampled", "column": column, "prompt": scene.format(words), "row": number})
    singles = adapter.parent / "samples"
    singles.mkdir(exist_ok=True)
    for column, rows in columns.items():
        for row, pictures in enumerate(rows):
            for seed, picture in zip(SEEDS, pictures, strict=True):
                picture.save(singles / f"{column}-{row}-{seed}.png")
    path = adapter.parent / "samples.png"
    _grid(columns, [scene.format(subject) for scene in SCENES]).save(path)
    return path


def _paint(
    parts: BaseParts, prompt: str, config: TrainingConfig, device: torch.device
) -> list[Image.Image]:
    """One picture a seed, at the run's resolution."""
    unet, vae = parts.unet, parts.vae
    assert config.resolution is not None
    side = config.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.inference_mode():
        latents, generators = noise(SEEDS, unet.config.in_channels, side, side)
        latents = denoise(
            unet,
            make_sampler("dpmsolver++", dict(parts.scheduler.config)),
            latents.to(device),
            generators,
            parts.encode([prompt], config.resolution),
            parts.blank(config.resolution),
            steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        return decode(vae, latents)


def _grid(columns: dict[str, list[list[Image.Image]]], captions: list[str]) -> Image.Image:
    rows = [[*base, *adapter] for base, adapter in zip(*columns.values(), strict=True)]
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(rows[0]), (side + _TEXT_HEIGHT) * len(rows)), "white")
    write = ImageDraw.Draw(sheet)
    for number, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top = number * (side + _TEXT_HEIGHT)
        write.text((2, top + 1), caption, fill="black")
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (place * side, top + _TEXT_HEIGHT))
    return sheet
