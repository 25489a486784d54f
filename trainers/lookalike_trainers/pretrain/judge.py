"""The judge: a small classifier of noun, style and background.

It learns from composites of real sprites alone, every pair of noun and style among them, and never
from a generated picture.  Blur and noise are added in training so that a soft picture is judged by
its shape; its accuracy on fresh composites is printed beside every bar.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookalike_trainers.pretrain.latents import to_tensor
from lookalike_trainers.pretrain.nouns import STYLES
from lookalike_trainers.pretrain.runs import (
    autocast,
    device,
    generator,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)
from lookalike_trainers.pretrain.scenes import (
    COLOURS,
    PLACES,
    Mix,
    Scene,
    Sprites,
    draw_scene,
    paint,
)

BACKGROUNDS = [*COLOURS, *PLACES]


@dataclass(frozen=True)
class Verdict:
    """Logits of a batch: ``noun`` [B, nouns], ``style`` [B, 3], ``background`` [B, 17]."""

    noun: Tensor
    style: Tensor
    background: Tensor


class Judge(nn.Module):
    """Four pairs of convolutions, a vector, three linear heads."""

    def __init__(self, nouns: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        for a, b in pairwise(channels):
            layers += [
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        # Where a thing lies matters for two objects: the last 4 x 4 map is kept, not averaged.
        self.vector = nn.Sequential(nn.Flatten(), nn.Linear(16 * 4 * width, 512), nn.ReLU())
        self.noun = nn.Linear(512, nouns)
        self.style = nn.Linear(512, len(STYLES))
        self.background = nn.Linear(512, len(BACKGROUNDS))

    def forward(self, x: Tensor) -> Verdict:
        """Judge pictures ``x`` [B, 3, 64, 64] on [-1, 1]."""
        h = self.vector(self.body(x))
        return Verdict(self.noun(h), self.style(h), self.background(h))


def targets(scenes: list[Scene], nouns: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Noun shares [B, nouns] (two objects: a half each), style index [B], background index [B]."""
    noun = torch.zeros(len(scenes), len(nouns))
    for i, scene in enumerate(scenes):
        for name in scene.nouns:
            noun[i, nouns.index(name)] = 1 / len(scene.nouns)
    style = torch.tensor([list(STYLES).index(s.style) for s in scenes])
    return noun, style, torch.tensor([BACKGROUNDS.index(s.background) for s in scenes])


def soften(x: Tensor, draw: torch.Generator) -> Tensor:
    """Blur half of the pictures ``x`` [B, 3, H, W] by a random amount; add a little noise to all.

    The blur is a mix with a picture averaged over 2 x 2 and enlarged again.
    """
    small = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(x), 1, 1, 1, generator=draw)
    amount = amount * (torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5)
    amount = amount.to(x.device)
    noise = torch.randn(x.shape, generator=draw).to(x.device)
    return x + amount * (small - x) + 0.03 * noise


def train_judge(
    nouns: list[str], sprites: Sprites, run: Path, *, steps: int, batch_size: int = 64
) -> Judge:
    """Train to ``steps``, or read the judge of as many steps from ``run/judge.pt``."""
    where = device()
    torch.manual_seed(0)
    judge = Judge(len(nouns)).to(where)
    state = load_checkpoint(run / "judge.pt")
    if state is not None and (state["nouns"], state.get("steps")) == (nouns, steps):
        judge.load_state_dict(state["model"])
        return judge.eval()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    pairs = [(noun, style) for noun in nouns for style in STYLES]
    rng, draw = random.Random(0), generator(0, 7)
    mix = Mix(two_objects=0.5)  # two at half the size are the harder half of its work
    for step in range(steps):
        scenes = [draw_scene(rng, pairs, mix) for _ in range(batch_size)]
        x = to_tensor([paint(scene, sprites, rng) for scene in scenes]).to(where)
        noun, style, background = (t.to(where) for t in targets(scenes, nouns))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3, 50, decay=0.7)
        with autocast():
            verdict = judge(soften(x, draw))
        loss = (
            F.cross_entropy(verdict.noun.float(), noun)
            + 0.3 * F.cross_entropy(verdict.style.float(), style)
            + 0.3 * F.cross_entropy(verdict.background.float(), background)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"judge step {step + 1} loss {loss.item():.3f}", flush=True)
    save_checkpoint(run / "judge.pt", {"nouns": nouns, "steps": steps, "model": judge.state_dict()})
    return judge.eval()
