"""What a training will take, before it is queued. Torch-free: shapes come from file headers."""

import math
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_platform.bases import Base
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.settings import Settings
from lookalike_registry.adapter_file import base_shapes
from lookalike_trainers.config import (
    TARGET_GROUPS,
    TEXT_ATTENTION,
    LoraConfig,
    TrainingConfig,
    ends_in,
)

_FLOAT = 4  # bytes: trainables, gradients and optimiser state are float32
_RECENT = 5


@dataclass(frozen=True)
class Cost:
    """The preview. Bytes and seconds; seconds are None until a run on this base has finished here.

    state_bytes: base weights of the denoiser (twice where the base's output is preserved),
        trainables, their gradients and AdamW's two moments; activations, which grow with batch_size
        and resolution, come on top.
    """

    trainable_parameters: int
    adapter_bytes: int
    state_bytes: int
    steps: int
    samples: int
    processes: int
    prior_images: int
    seconds: float | None
    seconds_based_on: str | None


def preview(session: Session, base: Base, config: TrainingConfig, settings: Settings) -> Cost:
    """What `config` costs on `base`.

    Raises:
        InvalidRequest: the base has no layers of the targets named.
    """
    shapes = base_shapes(base.folder)
    trainable = _lora_parameters(shapes, config) if isinstance(config, LoraConfig) else 0
    unet = sum(math.prod(s) for name, s in shapes.items() if name.startswith("unet."))
    if config.output_preservation:
        unet *= 2
    processes = config.num_processes or settings.num_processes
    per_step = _samples_per_step(config, processes)
    rate, source = _samples_per_second(session, base, settings)
    return Cost(
        trainable_parameters=trainable,
        adapter_bytes=trainable * _FLOAT,
        state_bytes=unet * _FLOAT + trainable * 4 * _FLOAT,
        steps=config.steps,
        samples=config.steps * per_step,
        processes=processes,
        prior_images=config.prior.num_images if config.prior else 0,
        seconds=round(config.steps * per_step / rate, 1) if rate else None,
        seconds_based_on=source,
    )


def _lora_parameters(shapes: dict[str, tuple[int, ...]], config: LoraConfig) -> int:
    """A: [rank, in * kernel], B: [out, rank] a targeted layer, DoRA's m: [out]; token rows."""
    text_targets = TEXT_ATTENTION if config.train_text_encoder else ()
    total, tokens = 0, 0
    for name, shape in shapes.items():
        part, _, module = name.partition(".")
        targets = config.target_modules if part == "unet" else text_targets
        if len(shape) in (2, 4) and ends_in(module, targets):
            own = (rank for end, rank in config.module_ranks.items() if ends_in(module, (end,)))
            total += next(own, config.rank) * (math.prod(shape[1:]) + shape[0])
            total += shape[0] if config.dora else 0
        if module == "embeddings.token_embedding":
            tokens += config.token_vectors * shape[1]
    if not total:
        named, groups = ", ".join(config.targets), ", ".join(TARGET_GROUPS)
        message = f"the base has no layers named {named}; there are the groups {groups}"
        raise InvalidRequest(
            f"Nothing would train: {message}.", [FieldProblem("config.targets", message)]
        )
    return total + tokens


def _samples_per_step(config: TrainingConfig, processes: int) -> int:
    photos = config.batch_size * config.gradient_accumulation_steps * processes
    return photos * 2 if config.prior or config.output_preservation else photos


def _samples_per_second(
    session: Session, base: Base, settings: Settings
) -> tuple[float | None, str | None]:
    """The median rate of the newest finished runs on this base, and which they were."""
    query = (
        select(Job)
        .where(
            Job.kind == "train",
            Job.state == "succeeded",
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
    return rates[len(rates) // 2], f"the last {len(rates)} finished runs on {base.name}"
