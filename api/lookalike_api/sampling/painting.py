"""One order on its way through the engine. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from lookalike_api.sampling.cache import Kept
from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_api.sampling.models import Dressed, Read, ResidentBase
from lookalike_api.sampling.start import start_of
from lookalike_platform.conditioning import Text
from lookalike_platform.diffusion import draw, generators_of
from lookalike_platform.guidance import Guidance
from lookalike_platform.samplers import make_sampler
from lookalike_platform.walk import Walk
from lookalike_trainers.methods.row_edits import Answers, Outfit, Slot


@dataclass(eq=False)
class Painting:
    """An order, what it holds in memory, and its pictures as they come.

    worn: adapters for the whole base; taken: those for single rows, pinned in their cache.
    """

    number: int
    order: SampleOrder
    base: ResidentBase
    worn: tuple[AdapterFile, ...] = ()
    taken: list[tuple[AdapterFile, Kept[Any]]] = field(default_factory=list)
    alone: bool = False
    batches: list["Batch"] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> bool:
        return all(kept.value.done() for _, kept in self.taken)

    @property
    def done(self) -> bool:
        return all(batch.pictures for batch in self.batches)

    def split(self, most: int) -> None:
        """Into batches of at most so many pictures."""
        count = self.order.num_images
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
        dressed = [Dressed(kept.value.result(), file) for file, kept in self.taken]
        text = base.read(order.prompt, dressed)
        blank = base.read_negative(order.negative_prompt, dressed)
        self.warnings = self._truncations(text, base.read(order.negative_prompt, dressed))
        batch.outfit = tuple((one.adapter, one.file.scale) for one in dressed)
        count = len(batch.numbers)
        batch.text = by_layer([blank.text, text.text])
        batch.text = Text.cat([batch.text[:1].expand(count), batch.text[1:].expand(count)])
        batch.answers = base.edits.answers(batch.outfit, batch.text.features)
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

    def _truncations(self, text: Read, blank: Read) -> list[str]:
        """A warning for each text longer than the encoder reads."""
        most = self.base.max_tokens
        return [
            f"The {name} is {read.tokens} tokens long and was cut off after {most}, "
            "which is all this base model reads."
            for name, read in (("prompt", text), ("negative prompt", blank))
            if read.tokens > most
        ]


@dataclass(eq=False)
class Batch:
    """Pictures of one order that walk together.

    numbers: of the pictures in the order
    text: for each picture the negative prompt, then for each the prompt
    answers: what K and V say more of each of these
    """

    painting: Painting
    numbers: range
    outfit: Outfit = ()
    text: Text | None = None
    answers: Answers = field(default_factory=dict)
    walk: Walk | None = None
    pictures: list[Image.Image] = field(default_factory=list)

    @property
    def pixels(self) -> int:
        order = self.painting.order
        return order.width * order.height * len(self.numbers)

    def asked(self) -> "Asked":
        """What this step wants to know of the denoiser."""
        walk, text = self.walk, self.text
        assert walk is not None
        assert text is not None
        seen, timesteps = walk.ask()
        if walk.guided:
            rows = slice(None)
            seen, timesteps = torch.cat([seen, seen]), torch.cat([timesteps, timesteps])
        else:
            rows = slice(len(seen), None)
        answers = {name: said[rows] for name, said in self.answers.items()}
        return Asked(seen, timesteps, text[rows], Slot(self.outfit, len(seen), answers))


@dataclass(frozen=True)
class Asked:
    """Rows of a batch: latents [rows, c, h, w], timesteps [rows], texts, and what they wear."""

    seen: torch.Tensor
    timesteps: torch.Tensor
    text: Text
    slot: Slot


def by_layer(texts: Sequence[Text]) -> Text:
    """Texts of one base in one: where some have features by layer, the others repeat theirs."""
    layers = max((text.features.shape[1] for text in texts if text.features.dim() == 4), default=0)
    if layers:
        texts = [
            text
            if text.features.dim() == 4
            else Text(
                text.features.unsqueeze(1).expand(-1, layers, -1, -1), text.pooled, text.time_ids
            )
            for text in texts
        ]
    return Text.cat(texts)
