"""Adapters worn together, and all that a base then says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_platform.conditioning import predict
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.find import wear_of
from support_methods import CARD, SIDE, trained
from support_models import RESOLUTION

TIMESTEP = 480
LEAVES = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
Adapter = tuple[str, Path, float, str]  # method, file, scale, word


def trained_adapter(base: Path, folder: Path, kind: str, number: int) -> Adapter:
    """The first (0) or the second adapter of a kind (rules.KINDS), or `pivotal`."""
    options: dict[str, Any] = {"dora": {"dora": True}, "pivotal": {"token_vectors": 1}}.get(
        kind, {}
    )
    name = "lora" if options else kind
    method, _ = trained(base, name, steps=2 + number, **options)
    own = folder / f"{kind}-{number}"
    own.mkdir()
    return (name, method.save(own, CARD), (1.0, 0.6)[number], ("sks", "zwx")[number])


@contextmanager
def wearing(parts: BaseParts, *adapters: Adapter) -> Iterator[None]:
    undo = [wear_of(name)(parts, file, scale, word) for name, file, scale, word in adapters]
    yield
    for take_off in undo:
        take_off()


@torch.no_grad()
def answers(parts: BaseParts, prompt: str = "a sks zwx") -> dict[str, torch.Tensor]:
    """What every layer says to inputs of its own, and the UNet (`whole`) to the prompt."""
    text = parts.encode([prompt], RESOLUTION)
    said = {"whole": predict(parts.unet, *noisy(1), text)}
    for part, model in parts_of(parts).items():
        for name, layer in model.named_modules():
            if isinstance(layer, LEAVES):
                said[f"{part}.{name}"] = layer(inputs_of(layer))
    return said


def noisy(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `answers` asks the UNet about, so many times: latents and timesteps."""
    latents = torch.randn((1, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    return latents.expand(rows, -1, -1, -1), torch.tensor([TIMESTEP] * rows)


def inputs_of(layer: Any) -> torch.Tensor:
    shape = {
        nn.Linear: lambda: (1, 3, layer.in_features),
        nn.Conv2d: lambda: (1, layer.in_channels, 6, 6),
        nn.GroupNorm: lambda: (1, layer.num_channels, 6, 6),
        nn.LayerNorm: lambda: (1, 3, *layer.normalized_shape),
    }[type(layer)]()
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
