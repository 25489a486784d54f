"""The run's randomness: a pure function of (seed, step, place in the step's global batch). Torch.

Nothing is drawn from a stream that has a position. So a resumed run needs no random state, and the
same global batch is drawn by one process or several, in one micro-batch or several.
"""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """One sample's luck. noise, posterior: [channels, height, width], unit Gaussian.

    look: in [0, 1), which of the photo's views.
    """

    photo: int
    look: float
    timestep: int
    drop_caption: bool
    noise: torch.Tensor
    posterior: torch.Tensor


def draw(
    seed: int,
    step: int,
    place: int,
    *,
    position: int,
    photos: int,
    timesteps: int,
    caption_dropout: float,
    noise_offset: float,
    shape: tuple[int, ...],
    of: str,
) -> Draw:
    """The sample at `place` of the global batch of `step`, both counted from 0.

    Args:
        position: samples drawn before this one in the whole run. Photos come in a new order each
            time all have been seen.
        noise_offset: s of noise + s u, u ~ N(0, 1) the same for a whole channel: what changes a
            picture's brightness as a whole is otherwise hardly ever seen noised.
        of: "instance" or "class": the two draw independently.
    """
    order = torch.randperm(photos, generator=generator(seed, of, "order", position // photos))
    g = generator(seed, of, "sample", step, place)
    noise, posterior = torch.randn((2, *shape), generator=g)
    chance = torch.rand(2, generator=g)
    timestep = int(torch.randint(timesteps, (1,), generator=g))
    if noise_offset:
        noise = noise + noise_offset * torch.randn((shape[0], 1, 1), generator=g)
    return Draw(
        photo=int(order[position % photos]),
        look=float(chance[0]),
        timestep=timestep,
        drop_caption=bool(chance[1] < caption_dropout),
        noise=noise,
        posterior=posterior,
    )


def bucket_turn(seed: int, step: int, photos: list[int]) -> tuple[int, int]:
    """Which bucket the step is of, and how many earlier steps were of it.

    photos: how many each bucket has. In every round of as many steps as there are photos, each
    bucket has as many turns as photos, so that every photo is seen equally often.
    """
    if len(photos) == 1:
        return 0, step
    turns = torch.tensor([number for number, count in enumerate(photos) for _ in range(count)])
    rounds, now = divmod(step, len(turns))
    order = turns[torch.randperm(len(turns), generator=generator(seed, "buckets", rounds))]
    bucket = int(order[now])
    return bucket, rounds * photos[bucket] + int((order[:now] == bucket).sum())


def generator(*coordinates: int | str) -> torch.Generator:
    """A generator seeded by the digest of its coordinates: near ones give unrelated numbers."""
    digest = hashlib.sha256(repr(coordinates).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
