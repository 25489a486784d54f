"""What a training will take, before it is queued. Torch-free: shapes come from file headers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_platform.bases import Base
from lookalike_platform.db.tables import Job
from lookalike_platform.settings import Settings
from lookalike_registry.tensor_file import parameter_shapes
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.prompts import class_prompt
from lookalike_trainers.trainables import count, held_bytes
from lookalike_trainers.views import bucket_shapes, side_multiple

_FLOAT = 4  # bytes: trainables, gradients and optimiser state are float32
_RECENT = 5


@dataclass(frozen=True)
class Cost:
    """The preview. Bytes and seconds; seconds are None until a run on this base has finished here.

    trigger: the word that the subject will answer to.
    prior_images: how many the base is to draw, of all classes together.
    state_bytes: base weights of the denoiser (twice where the base's output is preserved),
        trainables, their gradients, AdamW's two moments, the moving average if there is one, and
        SVDiff's factors; activations, which grow with batch_size and resolution, come on top.
    """

    trigger: str
    trainable_parameters: int
    adapter_bytes: int
    state_bytes: int
    steps: int
    samples: int
    processes: int
    prior_images: int
    seconds: float | None
    seconds_based_on: str | None


def preview(
    session: Session,
    base: Base,
    method: str,
    config: TrainingConfig,
    settings: Settings,
    class_nouns: Sequence[str],
) -> Cost:
    """What a training with the method's config costs on `base`.

    Args:
        class_nouns: of the subjects.

    Raises:
        InvalidRequest: the base has no layers of the targets named, or too narrow ones; photos
            cannot keep their shapes at this resolution.
    """
    if config.aspect_buckets:
        bucket_shapes(config.resolution or base.resolution, side_multiple(base.folder))
    shapes = parameter_shapes(base.folder)
    numbers = count(shapes, config)
    unet = sum(math.prod(s) for name, s in shapes.items() if name.startswith("unet."))
    if config.output_preservation:
        unet *= 2
    processes = config.num_processes or settings.num_processes
    per_step = _samples_per_step(config, processes)
    rate, source = _samples_per_second(session, base, method, settings)
    return Cost(
        trigger=config.trigger,
        trainable_parameters=numbers.trained,
        adapter_bytes=numbers.kept * _FLOAT,
        state_bytes=unet * _FLOAT
        + numbers.trained * _bytes_each(config)
        + held_bytes(shapes, config),
        steps=config.steps,
        samples=config.steps * per_step,
        processes=processes,
        prior_images=_prior_images(config, class_nouns),
        seconds=round(config.steps * per_step / rate, 1) if rate else None,
        seconds_based_on=source,
    )


def _prior_images(config: TrainingConfig, class_nouns: Sequence[str]) -> int:
    """As many for each class there is among the subjects (prepare.py)."""
    if config.prior is None or config.prior.subject_set:
        return 0
    return config.prior.num_images * len({class_prompt(config, noun) for noun in class_nouns})


def _bytes_each(config: TrainingConfig) -> int:
    """What training keeps of one number that trains."""
    moments = 2 if config.optimizer == "adamw8bit" else 2 * _FLOAT
    average = _FLOAT if config.ema_decay else 0
    return 2 * _FLOAT + moments + average


def _samples_per_step(config: TrainingConfig, processes: int) -> int:
    photos = config.batch_size * config.gradient_accumulation_steps * processes
    return photos * 2 if config.prior or config.output_preservation else photos


def _samples_per_second(
    session: Session, base: Base, method: str, settings: Settings
) -> tuple[float | None, str | None]:
    """The median rate of the method's newest finished runs on this base, and which they were."""
    query = (
        select(Job)
        .where(
            Job.kind == "train",
            Job.state == "succeeded",
            Job.method == method,
            Job.base_fingerprint == base.fingerprint,
        )
        .order_by(Job.id.desc())
        .limit(_RECENT)
    )
    rates = []
    for job in session.scalars(query):
        config = TrainingConfig.model_validate(
            {k: v for k, v in job.request["config"].items() if k in TrainingConfig.model_fields}
        )
        speed = job.progress.get("steps_per_second")
        if speed:
            processes = config.num_processes or settings.num_processes
            rates.append(float(speed) * _samples_per_step(config, processes))
    if not rates:
        return None, None
    rates.sort()
    return rates[len(rates) // 2], f"the last {len(rates)} finished runs of {method} on {base.name}"
