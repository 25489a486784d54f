"""The quality bars, measured: `lookalike pretrain evaluate`."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookalike_trainers.pretrain.judge import Judge, Verdict, targets
from lookalike_trainers.pretrain.latents import to_tensor, training_pairs
from lookalike_trainers.pretrain.metrics import all_in_top_k, psnr, top_k
from lookalike_trainers.pretrain.models import load_vae
from lookalike_trainers.pretrain.nouns import held_out_pairs
from lookalike_trainers.pretrain.runs import device
from lookalike_trainers.pretrain.sampling import load_pipeline, sample
from lookalike_trainers.pretrain.scenes import (
    COLOURS,
    Mix,
    Scene,
    Sprites,
    caption,
    draw_scene,
    paint,
)

GUIDANCE = 4.0
STEPS = 30


@dataclass(frozen=True)
class Bar:
    """One measured figure; ``demanded`` is None where a figure only informs.

    ``judge`` is the same figure on composites of real sprites: what a perfect painter would get.
    ``ceiling`` is the same on those composites encoded and decoded: what a perfect denoiser would.
    """

    name: str
    measured: float
    demanded: float | None = None
    judge: float | None = None
    ceiling: float | None = None

    @property
    def met(self) -> bool:
        return self.demanded is None or self.measured >= self.demanded

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def colour_scenes(count: int, pairs: list[tuple[str, str]], seed: int) -> list[Scene]:
    """``count`` single-object scenes on plain colours, walking through ``pairs`` evenly."""
    rng = random.Random(seed)
    order = [pair for _ in range(count // len(pairs) + 1) for pair in rng.sample(pairs, len(pairs))]
    return [Scene((n,), s, rng.choice(list(COLOURS))) for n, s in order[:count]]


def two_object_scenes(count: int, pairs: list[tuple[str, str]], seed: int) -> list[Scene]:
    """``count`` scenes of two nouns on plain colours."""
    rng, mix = random.Random(seed), Mix(two_objects=1, places=0, odd_layouts=0)
    return [draw_scene(rng, pairs, mix) for _ in range(count)]


@torch.no_grad()
def judged(judge: Judge, pictures: Tensor) -> Verdict:
    """The judge's logits, on the CPU."""
    parts = [judge(part.to(device())) for part in pictures.split(100)]
    return Verdict(
        torch.cat([p.noun for p in parts]).cpu(),
        torch.cat([p.style for p in parts]).cpu(),
        torch.cat([p.background for p in parts]).cpu(),
    )


def scene_figures(verdict: Verdict, scenes: list[Scene], nouns: list[str]) -> dict[str, float]:
    """noun top-1 and top-5, style and background accuracy of single-object scenes."""
    shares, style, background = targets(scenes, nouns)
    noun = shares.argmax(1)
    return {
        "top1": top_k(verdict.noun, noun, 1),
        "top5": top_k(verdict.noun, noun, 5),
        "style": top_k(verdict.style, style, 1),
        "background": top_k(verdict.background, background, 1),
    }


def both_nouns(verdict: Verdict, scenes: list[Scene], nouns: list[str]) -> float:
    """Share of two-object scenes with both nouns in the top five."""
    wanted = torch.tensor([[nouns.index(n) for n in scene.nouns] for scene in scenes])
    return all_in_top_k(verdict.noun, wanted, 5)


def painted(scenes: list[Scene], sprites: Sprites, seed: int) -> Tensor:
    """Composites of real sprites for ``scenes``, [N, 3, 64, 64] on [-1, 1]."""
    rng = random.Random(seed)
    return to_tensor([paint(scene, sprites, rng) for scene in scenes])


@torch.no_grad()
def reconstructed(vae: Any, pictures: Tensor) -> Tensor:
    """``pictures`` [N, 3, H, W] encoded, and the posterior's mean decoded."""
    parts = []
    for part in pictures.split(64):
        latent = vae.encode(part.to(device())).latent_dist.mode()
        parts.append(vae.decode(latent).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


def autoencoder_bars(
    folder: Path,
    nouns: list[str],
    sprites: Sprites,
    photos: list[NDArray[np.uint8]],
    unseen: list[NDArray[np.uint8]],
    *,
    prompts: int = 500,
) -> list[Bar]:
    """PSNR of ``folder``'s autoencoder on composites, on held-out crops and on ``unseen`` ones.

    ``photos`` are held out of the recipe's data, ``unseen``, if any, from elsewhere; RGB
    [64, 64, 3].
    """
    vae = load_vae(folder).to(device())
    composites = painted(colour_scenes(prompts, training_pairs(nouns), seed=1), sprites, 11)
    kinds = {
        "held-out composites": (composites, 26),
        "held-out photographs": (to_tensor(photos), 24),
    }
    if unseen:
        kinds["photographs never seen"] = (to_tensor(unseen), 24)
    return [
        Bar(
            f"autoencoder PSNR, {kind} (dB)", psnr(reconstructed(vae, pictures), pictures), demanded
        )
        for kind, (pictures, demanded) in kinds.items()
    ]


def painting_bars(
    folder: Path, judge: Judge, nouns: list[str], sprites: Sprites, *, prompts: int = 500
) -> list[Bar]:
    """Every bar that the judge reads off pictures; a fifth of ``prompts`` show two objects."""
    pipe = load_pipeline(folder)
    pairs = training_pairs(nouns)
    held = sorted(held_out_pairs(nouns))
    seen = colour_scenes(prompts, pairs, seed=1)
    new = colour_scenes(min(prompts, len(held)), held, seed=2)
    two = two_object_scenes(max(prompts // 5, 1), pairs, seed=3)

    def paint_by_model(scenes: list[Scene], guidance: float) -> Verdict:
        pictures = sample(pipe, [caption(s) for s in scenes], guidance=guidance, steps=STEPS)
        return judged(judge, pictures)

    guided = scene_figures(paint_by_model(seen, GUIDANCE), seen, nouns)
    free = scene_figures(paint_by_model(seen, 1.0), seen, nouns)
    held_figures = scene_figures(paint_by_model(new, GUIDANCE), new, nouns)
    both = both_nouns(paint_by_model(two, GUIDANCE), two, nouns)

    composites = painted(seen, sprites, 11)
    composites_new, composites_two = painted(new, sprites, 12), painted(two, sprites, 13)
    decoded, decoded_new = (
        reconstructed(pipe.vae, composites),
        reconstructed(pipe.vae, composites_new),
    )
    real = scene_figures(judged(judge, composites), seen, nouns)
    real_new = scene_figures(judged(judge, composites_new), new, nouns)
    best = scene_figures(judged(judge, decoded), seen, nouns)
    best_new = scene_figures(judged(judge, decoded_new), new, nouns)
    real_two = both_nouns(judged(judge, composites_two), two, nouns)
    best_two = both_nouns(judged(judge, reconstructed(pipe.vae, composites_two)), two, nouns)

    return [
        Bar("noun top-1", guided["top1"], 0.6, real["top1"], best["top1"]),
        Bar("noun top-5", guided["top5"], 0.8, real["top5"], best["top5"]),
        Bar(
            "background colour",
            guided["background"],
            0.95,
            real["background"],
            best["background"],
        ),
        Bar("style", guided["style"], 0.9, real["style"], best["style"]),
        Bar("two objects, both in top-5", both, 0.4, real_two, best_two),
        Bar("noun top-1 at guidance 1", free["top1"]),
        Bar("noun top-1, guidance 4 over 1", guided["top1"] / max(free["top1"], 1e-9), 1.5),
        Bar(
            "held-out pairs, noun top-1",
            held_figures["top1"],
            0.4,
            real_new["top1"],
            best_new["top1"],
        ),
        Bar(
            "held-out pairs, noun top-5",
            held_figures["top5"],
            None,
            real_new["top5"],
            best_new["top5"],
        ),
        Bar(
            "held-out pairs, style",
            held_figures["style"],
            None,
            real_new["style"],
            best_new["style"],
        ),
    ]
