"""A finished adapter, tried: loaded back from its file into plain diffusers and made to paint.

The grid shows what it learned: one row a prompt, the base for the plain class noun at the left, the
adapter at the right, both from the same noise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lookalike_datasets.features.text import tokenize
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_trainers.config import RunRequest, TrainingConfig

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
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(
        request.base_folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(device)
    subject = f"{config.trigger} {request.class_noun}"
    columns: dict[str, list[list[Image.Image]]] = {"base": [], "adapter": []}
    for column, words in (("base", request.class_noun), ("adapter", subject)):
        if column == "adapter":
            pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
        for number, scene in enumerate(SCENES):
            columns[column].append(_paint(pipeline, scene.format(words), config, device))
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
    pipe: Any, prompt: str, config: TrainingConfig, device: torch.device
) -> list[Image.Image]:
    """One picture a seed, at the run's resolution."""
    unet, vae = pipe.unet, pipe.vae
    assert config.resolution is not None
    side = config.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.inference_mode():
        ids = tokenize(pipe.tokenizer, [prompt, ""]).to(device)
        text, blank = pipe.text_encoder(ids)[0].split(1)
        latents, generators = noise(SEEDS, unet.config.in_channels, side, side)
        latents = denoise(
            unet,
            make_sampler("dpmsolver++", dict(pipe.scheduler.config)),
            latents.to(device),
            generators,
            text,
            blank,
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
