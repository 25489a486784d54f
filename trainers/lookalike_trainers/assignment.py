"""What a training job is about, from the database, and the records made of it. Torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from lookalike_datasets import subject_sets
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job, SubjectImage, SubjectSet
from lookalike_platform.errors import InvalidRequest, TrainingFailed
from lookalike_platform.settings import Settings
from lookalike_registry.manifest import (
    Evaluation,
    Identity,
    Lineage,
    Manifest,
    Prompting,
    base_record,
    version_id,
    weights_record,
)
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.method_configs import CustomDiffusionConfig
from lookalike_trainers.rare_tokens import rare_words
from lookalike_trainers.run_request import MoreSubject, RunImage, RunRequest


@dataclass(frozen=True)
class Assignment:
    """A job with its photos (the accepted ones, in order) and its config as it was admitted.

    class_photos: the user's own class images, where the config names a set of them.
    also: more subjects that the same run learns, their sets with their photos.
    """

    job: Job
    subject_set: SubjectSet
    photos: list[SubjectImage]
    class_photos: list[SubjectImage]
    also: list[tuple[SubjectSet, list[SubjectImage]]]
    config: TrainingConfig


def assignment(db: Database, job_id: str) -> Assignment:
    """Raises TrainingFailed if the subject set is gone."""
    with db.read_session() as session:
        job = session.get_one(Job, job_id)
        if job.subject_set_id is None:
            raise TrainingFailed("The job's subject set has been deleted: upload it again.")
        info = next(m for m in METHODS if m.name == job.method)
        config = info.config.model_validate(job.request["config"])
        subject_set = subject_sets.get(session, job.owner, job.subject_set_id)
        photos = _accepted(session, subject_set)
        class_photos = []
        if config.prior and config.prior.subject_set:
            class_set = subject_sets.get(session, job.owner, config.prior.subject_set)
            class_photos = _accepted(session, class_set)
        named = config.also if isinstance(config, CustomDiffusionConfig) else ()
        others = [subject_sets.get(session, job.owner, set_id) for set_id in named]
        also = [(other, _accepted(session, other)) for other in others]
    return Assignment(job, subject_set, photos, class_photos, also, config)


def _accepted(session: Session, subject_set: SubjectSet) -> list[SubjectImage]:
    return [p for p in subject_sets.images(session, subject_set.id) if p.sha256]


def resolve_base(job: Job, settings: Settings) -> Base:
    """The job's base on this worker. Raises InvalidRequest if its weights are not the ones."""
    base = bases.resolve(job.base_model, settings)
    if base.fingerprint != job.base_fingerprint:
        raise InvalidRequest(
            f"The base model {job.base_model} on this worker has other weights than when the job "
            "was accepted. Install the same base on API and workers, then submit it again."
        )
    return base


def complete(config: TrainingConfig, base: Base, class_noun: str) -> TrainingConfig:
    """The config with what base and subject decide."""
    initializer = config.initializer
    if initializer is None:
        initializer = class_noun if config.starts_from_noun else rare_words(base.folder)[0]
    return config.model_copy(
        update={
            "resolution": config.resolution or base.resolution,
            "initializer": initializer,
        }
    )


def run_request(work: Assignment, blobs: BlobStore, settings: Settings) -> RunRequest:
    """What the ranks are told: every default filled in, photos as local files."""
    job, config = work.job, work.config
    base = resolve_base(job, settings)
    whole = complete(config, base, work.subject_set.class_noun)
    return RunRequest(
        job_id=job.id,
        owner=job.owner,
        concept=job.concept or work.subject_set.name,
        class_noun=work.subject_set.class_noun,
        method=str(job.method),
        config=whole.model_dump(mode="json"),
        base_name=base.name,
        base_folder=base.folder,
        base_fingerprint=base.fingerprint,
        base_family=base.family,
        prediction_type=base.prediction_type,
        images=_as_files(work.photos, blobs),
        also=[
            MoreSubject(class_noun=other.class_noun, images=_as_files(photos, blobs))
            for other, photos in work.also
        ],
        class_images=_as_files(work.class_photos, blobs),
        cache=settings.cache,
        clip_encoder=settings.clip_encoder,
        dino_encoder=settings.dino_encoder,
        device=settings.device,
        num_processes=config.num_processes or settings.num_processes,
        zero_stage=settings.zero_stage if config.zero_stage is None else config.zero_stage,
    )


def _as_files(photos: list[SubjectImage], blobs: BlobStore) -> list[RunImage]:
    return [
        RunImage(
            path=blobs.path(str(p.sha256)),
            sha256=str(p.sha256),
            caption=p.caption,
            name=p.filename,
        )
        for p in photos
    ]


def manifest(work: Assignment, result: Path, attempts: int, settings: Settings) -> Manifest:
    """The version record of a finished run."""
    job, config = work.job, work.config
    base = resolve_base(job, settings)
    summary = json.loads((result / "result.json").read_text())
    request = RunRequest.model_validate_json((result.parent / "request.json").read_text())
    images = [*request.images, *(i for other in request.also for i in other.images)]
    return Manifest(
        identity=Identity(
            id=version_id(job.id),
            job_id=job.id,
            owner=job.owner,
            concept=request.concept,
            method=request.method,
        ),
        weights=weights_record(result / summary["weights"]),
        base=base_record(base),
        prompting=Prompting(
            class_noun=request.class_noun, trigger=config.trigger, phrase=config.phrase
        ),
        lineage=Lineage(
            subject_set=work.subject_set.id,
            subject_set_digest=work.subject_set.digest,
            images=[image.sha256 for image in images],
            prior_digest=summary["prior_digest"],
            config=config.model_dump(mode="json"),
            seed=config.seed,
            libraries=summary["libraries"],
            world_size=request.num_processes,
            zero_stage=request.zero_stage,
            attempts=attempts,
        ),
        evaluation=Evaluation(sample_grid=summary["grid_sha256"], **summary["evaluation"]),
    )
