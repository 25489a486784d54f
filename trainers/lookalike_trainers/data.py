"""Batches of a run, made from cached latents and text features. Torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch

from lookalike_datasets.features.latents import Moments
from lookalike_platform.conditioning import Text
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.denoiser import Denoiser
from lookalike_trainers.draws import Draw, bucket_turn, draw
from lookalike_trainers.objective import NoiseSchedule

EVALUATED = 8
"""Samples whose loss early stopping follows; more where there are more subjects."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: instance samples first, then as many that preserve the class.

    noisy, target: [n, c, h, w]; timesteps, weight: [n]; text: features, or ids
    [n, encoders, tokens] where something in the text encoders trains; time_ids: [n, 6], what SDXL
    is told of the views' sizes; mask: [n, 1, h, w], how much each place counts in the loss, or None
    for all alike.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    text: Text | torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    time_ids: torch.Tensor
    mask: torch.Tensor | None = None

    def answered_by(self, denoiser: Callable[..., torch.Tensor]) -> torch.Tensor:
        """What the denoiser, or the engine around it, predicts: [n, c, h, w]."""
        return denoiser(self.noisy, self.timesteps, self.text, self.time_ids)

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class View:
    """One way to see a photo, or a class image, with the rows of its texts.

    time_ids: what SDXL is told of its size (features/views.py).
    class_caption: of the caption with the class noun for the subject, where that is needed.
    subject: whose photo it is, by the order in which the run names its subjects.
    """

    moments: Moments
    caption: int
    time_ids: tuple[int, ...]
    class_caption: int = 0
    subject: int = 0


Sample = tuple[View, Draw]


@dataclass(frozen=True)
class Bucket:
    """Photos, and class images, of one shape: the views of each."""

    photos: list[list[View]]
    class_images: list[list[View]]


@dataclass(frozen=True)
class Reference:
    """The frozen base, for what it would say of a sample. texts: features by row."""

    base: Denoiser
    texts: Text

    def predict(self, batch: Batch, rows: list[int]) -> torch.Tensor:
        """[n, c, h, w] on the CPU of a batch's noisy latents under rows of `texts`."""
        device = next(self.base.parameters()).device
        with torch.no_grad():
            asked = replace(batch, text=self.texts[rows]).to(device)
            return asked.answered_by(self.base).to(batch.noisy.dtype).cpu()


@dataclass(frozen=True)
class TrainingData:
    """Everything a step needs. `texts`: table of features or ids; row 0 is the empty prompt.

    reference: where the base's output is preserved. validation: row of the validation prompt.
    """

    buckets: list[Bucket]
    texts: Text | torch.Tensor
    schedule: NoiseSchedule
    scaling_factor: float
    config: TrainingConfig
    reference: Reference | None = None
    validation: int | None = None

    def batch(self, step: int, micro: int, rank: int, world: int) -> Batch:
        """This rank's share of the step's micro-batch number `micro`; all of it of one bucket."""
        config = self.config
        first = (micro * world + rank) * config.batch_size
        places = range(first, first + config.batch_size)
        global_batch = config.batch_size * world * config.gradient_accumulation_steps
        number, turn = bucket_turn(config.seed, step, [len(b.photos) for b in self.buckets])
        bucket = self.buckets[number]
        samples = self._samples(bucket.photos, step, turn * global_batch, places, "instance")
        batch = self._batch(samples)
        if config.prior:
            of_class = self._samples(
                bucket.class_images, step, step * global_batch, places, "class"
            )
            return side_by_side(batch, self._batch(of_class), config.prior.weight)
        if config.output_preservation:
            preserved = self._preserved(batch, [view.class_caption for view, _ in samples])
            return side_by_side(batch, preserved, config.output_preservation.weight)
        return batch

    def evaluation(self) -> list[Batch]:
        """The same photos under the same noise, however often it is asked for; a batch a bucket.

        Plain errors: their weights make one mean of them all. They are spread evenly over the
        subjects, with one of each at least, and over the photos of each.
        """
        subjects = self._photos_by_subject()
        count = max(EVALUATED, len(subjects))
        turns = ceil(count / len(subjects))
        chosen: dict[int, list[Sample]] = {}
        for place in range(count):
            turn, number = divmod(place, len(subjects))
            photos = subjects[number]
            skips = len(photos) > turns
            bucket, views = photos[turn * len(photos) // turns if skips else turn % len(photos)]
            luck = self._draw(0, place, place, [views], "evaluation")
            sample = (views[0], replace(luck, drop_caption=False))
            chosen.setdefault(bucket, []).append(sample)
        batches = [self._batch(samples) for samples in chosen.values()]
        return [replace(b, weight=torch.full_like(b.weight, 1 / count)) for b in batches]

    def _photos_by_subject(self) -> list[list[tuple[int, list[View]]]]:
        """Of each subject its photos, each with the number of its bucket."""
        subjects: dict[int, list[tuple[int, list[View]]]] = {}
        for number, bucket in enumerate(self.buckets):
            for views in bucket.photos:
                subjects.setdefault(views[0].subject, []).append((number, views))
        return [subjects[number] for number in sorted(subjects)]

    def _samples(
        self, photos: list[list[View]], step: int, start: int, places: range, of: str
    ) -> list[Sample]:
        """What each place of the step learns; `start`: places that earlier steps have filled."""
        samples = []
        for place in places:
            luck = self._draw(step, place, start + place, photos, of)
            views = photos[luck.photo]
            samples.append((views[int(luck.look * len(views))], luck))
        return samples

    def _draw(
        self, step: int, place: int, position: int, photos: list[list[View]], of: str
    ) -> Draw:
        return draw(
            self.config.seed,
            step,
            place,
            position=position,
            photos=len(photos),
            timesteps=self.schedule.timesteps,
            caption_dropout=self.config.caption_dropout,
            noise_offset=self.config.noise_offset,
            shape=tuple(photos[0][0].moments.mean.shape),
            of=of,
        )

    def _batch(self, samples: list[Sample]) -> Batch:
        """Samples as they are to be learned; their weights are those of a mean over them."""
        clean = torch.stack(
            [view.moments.mean + view.moments.std * luck.posterior for view, luck in samples]
        )
        latents = clean * self.scaling_factor
        noise = torch.stack([luck.noise for _, luck in samples])
        numbers = torch.tensor([luck.timestep for _, luck in samples])
        rows = [0 if luck.drop_caption else view.caption for view, luck in samples]
        weight = self.schedule.weight(numbers, self.config.min_snr_gamma)
        return Batch(
            noisy=self.schedule.noised(latents, noise, numbers),
            timesteps=self.schedule.times[numbers],
            text=self.texts[rows],
            target=self.schedule.target(latents, noise, numbers),
            weight=weight / len(samples),
            time_ids=torch.tensor([view.time_ids for view, _ in samples]),
            mask=_masks([view.moments for view, _ in samples]),
        )

    def _preserved(self, batch: Batch, rows: list[int]) -> Batch:
        """The same noisy latents, told of the class: what the base says of them is to stay.

        Differential output preservation: MSE(eps_tuned(x_t, class), eps_base(x_t, class)).
        """
        assert self.reference is not None
        target = self.reference.predict(batch, rows)
        return replace(batch, text=self.texts[rows], target=target, mask=None)


def side_by_side(batch: Batch, other: Batch, weight: float) -> Batch:
    """One batch of both, the other's samples weighing `weight` times as much."""
    mask = None
    if batch.mask is not None or other.mask is not None:
        mask = torch.cat([_whole_mask(batch), _whole_mask(other)])
    if isinstance(batch.text, Text):
        assert isinstance(other.text, Text)
        text: Text | torch.Tensor = Text.cat([batch.text, other.text])
    else:
        assert isinstance(other.text, torch.Tensor)
        text = torch.cat([batch.text, other.text])
    return Batch(
        noisy=torch.cat([batch.noisy, other.noisy]),
        timesteps=torch.cat([batch.timesteps, other.timesteps]),
        text=text,
        target=torch.cat([batch.target, other.target]),
        weight=torch.cat([batch.weight, other.weight * weight]),
        time_ids=torch.cat([batch.time_ids, other.time_ids]),
        mask=mask,
    )


def _masks(moments: list[Moments]) -> torch.Tensor | None:
    if all(of.mask is None for of in moments):
        return None
    return torch.stack(
        [torch.ones_like(of.mean[:1]) if of.mask is None else of.mask for of in moments]
    )


def _whole_mask(batch: Batch) -> torch.Tensor:
    return torch.ones_like(batch.noisy[:, :1]) if batch.mask is None else batch.mask
