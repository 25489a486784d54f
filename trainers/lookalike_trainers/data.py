"""Batches of a run, made from cached latents and text features. Torch."""

from dataclasses import dataclass, fields

import torch

from lookalike_datasets.features.latents import Moments
from lookalike_platform.conditioning import Text
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.draws import Draw, draw
from lookalike_trainers.objective import NoiseSchedule


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: instance samples first, then class samples.

    noisy, target: [n, c, h, w]; timesteps, weight: [n]; text: features, or ids
    [n, encoders, tokens] where something in the text encoders trains.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    text: Text | torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Images:
    """Photos or class images. `captions`: for each photo, its row of the text table."""

    moments: Moments
    captions: list[int]


@dataclass(frozen=True)
class TrainingData:
    """Everything a step needs. `texts`: table of features or ids; row 0 is the empty prompt."""

    instance: Images
    prior: Images | None
    texts: Text | torch.Tensor
    schedule: NoiseSchedule
    scaling_factor: float
    config: TrainingConfig

    def batch(self, step: int, micro: int, rank: int, world: int) -> Batch:
        """This rank's share of the step's micro-batch number `micro`."""
        size = self.config.batch_size
        first = (micro * world + rank) * size
        places = range(first, first + size)
        global_batch = size * world * self.config.gradient_accumulation_steps
        samples = self._samples(self.instance, step, places, global_batch, "instance")
        weights = [1 / size] * size
        if self.prior and self.config.prior:
            samples += self._samples(self.prior, step, places, global_batch, "class")
            weights += [self.config.prior.weight / size] * size

        latents = torch.stack([latent for latent, _, _ in samples]) * self.scaling_factor
        noise = torch.stack([drawn.noise for _, drawn, _ in samples])
        timesteps = torch.tensor([drawn.timestep for _, drawn, _ in samples])
        rows = [0 if drawn.drop_caption else row for _, drawn, row in samples]
        return Batch(
            noisy=self.schedule.noised(latents, noise, timesteps),
            timesteps=timesteps,
            text=self.texts[rows],
            target=self.schedule.target(latents, noise, timesteps),
            weight=torch.tensor(weights)
            * self.schedule.weight(timesteps, self.config.min_snr_gamma),
        )

    def _samples(
        self, images: Images, step: int, places: range, global_batch: int, of: str
    ) -> list[tuple[torch.Tensor, Draw, int]]:
        """(latent drawn from the encoder's Gaussian, luck, text row) of each place."""
        moments = images.moments
        samples = []
        for place in places:
            drawn = draw(
                self.config.seed,
                step,
                place,
                global_batch=global_batch,
                photos=len(images.captions),
                flips=moments.flips,
                timesteps=self.schedule.timesteps,
                caption_dropout=self.config.caption_dropout,
                shape=tuple(moments.mean.shape[1:]),
                of=of,
            )
            latent = moments.mean[drawn.view] + moments.std[drawn.view] * drawn.posterior
            samples.append((latent, drawn, images.captions[drawn.view // moments.flips]))
        return samples
