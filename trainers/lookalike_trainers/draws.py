"""The run's randomness: a pure function of (seed, step, place in the step's global batch). Torch.

Nothing is drawn from a stream that has a position. So a resumed run needs no random state, and the
same global batch is drawn by one process or several, in one micro-batch or several.
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """One sample's luck. noise, posterior: [channels, height, width], unit Gaussian."""

    view: int
    timestep: int
    drop_caption: bool
    noise: torch.Tensor
    posterior: torch.Tensor


def draw(
    seed: int,
    step: int,
    place: int,
    *,
    global_batch: int,
    photos: int,
    flips: int,
    timesteps: int,
    caption_dropout: float,
    shape: tuple[int, ...],
    of: str,
) -> Draw:
    """The sample at `place` of the global batch of `step`, all counted from 0.

    Photos come in a new order each time all have been seen.

    Args:
        of: "instance" or "class": the two draw independently.
    """
    position = step * global_batch + place
    order = torch.randperm(photos, generator=generator(seed, of, "order", position // photos))
    g = generator(seed, of, "sample", step, place)
    noise, posterior = torch.randn((2, *shape), generator=g)
    chance = torch.rand(2, generator=g)
    return Draw(
        view=int(order[position % photos]) * flips + int(chance[0] * flips),
        timestep=int(torch.randint(timesteps, (1,), generator=g)),
        drop_caption=bool(chance[1] < caption_dropout),
        noise=noise,
        posterior=posterior,
    )


def generator(*coordinates: int | str) -> torch.Generator:
    """A generator seeded by the digest of its coordinates: near ones give unrelated numbers."""
    digest = hashlib.sha256(repr(coordinates).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
