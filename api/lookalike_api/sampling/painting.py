"""One order on its way through the engine. Imports torch."""

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from lookalike_api.sampling.cache import Kept
from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_api.sampling.models import ResidentBase
from lookalike_api.sampling.parts import ATTENTION, Part, check_regional, parts_of
from lookalike_api.sampling.start import start_of
from lookalike_platform.conditioning import Text
from lookalike_platform.diffusion import draw, generators_of
from lookalike_platform.guidance import Guidance
from lookalike_platform.samplers import make_sampler
from lookalike_platform.walk import Walk
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.row_edits import Slot


@dataclass(eq=False)
class Painting:
    """An order, what it holds in memory, and its pictures as they come.

    taken: adapters that act on single rows, pinned in their cache; the whole base wears the others
    checks: of the files of these, which are looked through meanwhile
    """

    number: int
    order: SampleOrder
    base: ResidentBase
    taken: list[tuple[AdapterFile, Kept[Any]]] = field(default_factory=list)
    checks: list[Future[None]] = field(default_factory=list)
    alone: bool = False
    batches: list["Batch"] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> bool:
        return all(one.done() for one in [*self.checks, *(kept.value for _, kept in self.taken)])

    @property
    def late(self) -> bool:
        """Past its deadline, and not begun."""
        return self.order.late and not any(batch.walk for batch in self.batches)

    @property
    def done(self) -> bool:
        return all(batch.pictures for batch in self.batches)

    @property
    def worn(self) -> tuple[AdapterFile, ...] | None:
        """Of the order's own adapters those that the whole base wears; None if regions have such,
        too, so that it changes clothes within each step."""
        by_row = dict(self.taken)
        whole = [file for file in self.order.files if file not in by_row]
        if whole and self.order.regions:
            return None
        return tuple(whole)

    @property
    def kind(self) -> Hashable:
        """Pictures of one kind can share a call of the denoiser: their texts are of one length,
        and the base wears the same for all that is asked of them."""
        order = self.order
        own = self.alone or self.worn is None
        beside = len(order.regions) if order.compose == ATTENTION else 0
        return order.width, order.height, self.worn, beside, self.number if own else None

    @property
    def questions(self) -> int:
        """How often at most the denoiser is asked of a picture in one step."""
        return 1 if self.order.compose == ATTENTION else 1 + len(self.order.regions)

    def split(self, pixels: int) -> None:
        """Into batches of at most so many pixels. Raises InvalidRequest for adapters, all of them
        loaded, that cannot act where they are to."""
        check_regional(self.order, self._by_row())
        order, count = self.order, self.order.num_images
        most = max(1, pixels // (order.width * order.height * self.questions))
        self.batches = [
            Batch(self, range(first, min(first + most, count))) for first in range(0, count, most)
        ]

    def steps(self) -> tuple[int, int]:
        """Steps done, and in all."""
        each = max(batch.walk.total for batch in self.batches if batch.walk)
        done = sum(batch.walk.count for batch in self.batches if batch.walk)
        return done, each * len(self.batches)

    def begin(self, batch: "Batch") -> None:
        """Text, noise and sampler of a batch. The base wears what the order wants it to.

        Raises InvalidRequest for what the base cannot do.
        """
        base, order = self.base, self.order
        count = len(batch.numbers)
        batch.parts = parts_of(order, base, self._by_row(), count)
        warnings = [warning for part in batch.parts for warning in part.warnings]
        self.warnings = list(dict.fromkeys(warnings))
        generators = generators_of([order.seed + i for i in batch.numbers])
        start = start_of(order, base.vae, generators)
        sides = order.height // base.vae_scale, order.width // base.vae_scale
        batch.walk = Walk(
            make_sampler(order.sampler, base.scheduler_config),
            draw(generators, base.channels, *sides).to(base.device, base.dtype),
            generators,
            steps=order.steps,
            guidance=Guidance(
                order.guidance_scale,
                order.guidance_rescale,
                order.guidance_interval,
                order.dynamic_threshold,
            ),
            start=start and start.to(base.device, base.dtype),
            eta=order.eta,
        )

    def _by_row(self) -> dict[AdapterFile, RowAdapter]:
        return {file: kept.value.result() for file, kept in self.taken}


@dataclass(eq=False)
class Batch:
    """Pictures of one order that walk together.

    numbers: of the pictures in the order
    parts: what is asked of them at each step
    """

    painting: Painting
    numbers: range
    parts: list[Part] = field(default_factory=list)
    walk: Walk | None = None
    pictures: list[Image.Image] = field(default_factory=list)
    _slots: dict[bool, list[Slot]] = field(default_factory=dict)

    @property
    def pixels(self) -> int:
        """Of all that is asked in a step."""
        return self.part_pixels * self.painting.questions

    @property
    def part_pixels(self) -> int:
        """Of what one part asks: of all the pictures."""
        return self.painting.order.width * self.painting.order.height * len(self.numbers)

    def asked(self) -> list["Asked"]:
        """What this step wants to know of the denoiser, part by part."""
        walk = self.walk
        assert walk is not None
        seen, timesteps = walk.ask()
        if walk.guided:
            rows = slice(None)
            seen, timesteps = torch.cat([seen, seen]), torch.cat([timesteps, timesteps])
        else:
            rows = slice(len(seen), None)

        if walk.guided not in self._slots:  # the same ones step after step: put on once
            self._slots[walk.guided] = [
                Slot(
                    part.outfit,
                    len(seen),
                    {name: said[rows] for name, said in part.answers.items()},
                    part.layout,
                )
                for part in self.parts
            ]
        return [
            Asked(seen, timesteps, part.text[rows], slot, part.worn, self.part_pixels)
            for part, slot in zip(self.parts, self._slots[walk.guided], strict=True)
        ]

    def answer(self, said: list[torch.Tensor]) -> None:
        """Go on with what the denoiser predicts, part by part.

        MultiDiffusion's x = sum of m_r x_r / sum of m_r (Bar-Tal et al. 2023, equation 5) is of
        latents after a step. Where each latent is of one region, and a step takes each latent
        from that one's prediction, a sum of predictions is the same, for every sampler.
        """
        walk = self.walk
        assert walk is not None
        predicted = placed(said, [part.place for part in self.parts])
        if walk.guided:
            unconditional, conditional = predicted.chunk(2)
            walk.answer(conditional, unconditional)
        else:
            walk.answer(predicted)


@dataclass(frozen=True)
class Asked:
    """Rows of a batch: latents [rows, c, h, w], timesteps [rows], texts, what they, and the whole
    base, wear, and the pixels of their pictures."""

    seen: torch.Tensor
    timesteps: torch.Tensor
    text: Text
    slot: Slot
    worn: tuple[AdapterFile, ...]
    pixels: int


def placed(said: list[torch.Tensor], places: list[torch.Tensor | None]) -> torch.Tensor:
    """Of predictions [rows, c, h, w] each in its own place."""
    whole = [one if place is None else place * one for one, place in zip(said, places, strict=True)]
    return torch.stack(whole).sum(0) if len(whole) > 1 else whole[0]
