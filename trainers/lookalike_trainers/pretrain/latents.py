"""Cached latents: every training scene is painted and encoded once, and memory-mapped after.

The encoder stays fixed while the denoiser trains, so a picture's latent never changes.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookalike_trainers.pretrain.nouns import STYLES, held_out_pairs
from lookalike_trainers.pretrain.runs import autocast, device, save_atomically
from lookalike_trainers.pretrain.scenes import Mix, Sprites, caption, draw_scene, paint


@dataclass(frozen=True)
class LatentCache:
    """``latents`` [N, C, h, w] float16, memory-mapped and scaled; one caption for each."""

    latents: NDArray[np.float16]
    captions: list[str]


def training_pairs(nouns: list[str]) -> list[tuple[str, str]]:
    """Every (noun, style) that training may show."""
    held = held_out_pairs(nouns)
    return [(noun, style) for noun in nouns for style in STYLES if (noun, style) not in held]


def paint_scenes(
    count: int, pairs: list[tuple[str, str]], sprites: Sprites, mix: Mix, seed: int
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """``count`` captions and their pictures, RGB [64, 64, 3]."""
    rng = random.Random(seed)
    for _ in range(count):
        scene = draw_scene(rng, pairs, mix)
        text = caption(scene, with_style=rng.random() >= mix.style_unsaid)
        yield text, paint(scene, sprites, rng)


def to_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """Pictures RGB [H, W, 3] as one float tensor [N, 3, H, W] on [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_scenes(
    folder: Path, count: int, nouns: list[str], sprites: Sprites, vae: Any, mix: Mix, seed: int = 0
) -> None:
    """Write ``latents.npy`` and ``captions.json`` of ``count`` scenes into ``folder``.

    The latent is the mean of the encoder's posterior times the scaling factor: its spread is about
    a hundredth of the latents' own, and bf16's error half of that (0.006 and 0.003 of pocket-64).
    """
    where = device()
    vae = vae.to(where).eval()
    captions: list[str] = []
    rows: list[NDArray[np.float16]] = []
    pictures: list[NDArray[np.uint8]] = []
    for text, picture in paint_scenes(count, training_pairs(nouns), sprites, mix, seed):
        captions.append(text)
        pictures.append(picture)
        if len(pictures) == 128 or len(captions) == count:
            with autocast():
                mean = vae.encode(to_tensor(pictures).to(where)).latent_dist.mode()
            rows.append((mean.float() * vae.config.scaling_factor).half().cpu().numpy())
            print(f"latents of {len(captions)} scenes", flush=True)
            pictures.clear()
    folder.mkdir(parents=True, exist_ok=True)
    latents = np.concatenate(rows)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, latents)

    save_atomically(folder / "latents.npy", write)
    save_atomically(folder / "captions.json", lambda path: path.write_text(json.dumps(captions)))


def open_cache(folder: Path) -> LatentCache:
    """Open what ``encode_scenes`` wrote."""
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    return LatentCache(latents, json.loads((folder / "captions.json").read_text()))
