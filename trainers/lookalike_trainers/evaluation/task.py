"""The worker's task `lookalike.evaluate`: one evaluation, from claim to figures. Torch-free.

claim → preparing → evaluating ─┬→ succeeded   figures with their intervals
                                ├→ failed      the adapter cannot be tried
                                ├→ canceled    its owner asked
                                └→ queued      the worker shuts down

The trainers' worker does it, in a process of its own: it has the device that training had.
"""

import json
import shutil
import time
from typing import Any

from lookalike_datasets import subject_sets
from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.celery_app import app
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import InvalidRequest, LookalikeError
from lookalike_platform.jobs.hold import Hold
from lookalike_platform.jobs.lease import Lease
from lookalike_platform.jobs.work import carry_out
from lookalike_platform.jobs.worker import worker_database, worker_name
from lookalike_platform.settings import Settings, get_settings
from lookalike_registry.check import registered_file
from lookalike_trainers.assignment import resolve_base
from lookalike_trainers.evaluation.request import EvaluateJob, EvaluationRequest
from lookalike_trainers.following import follow
from lookalike_trainers.launcher import launch_module


@app.task(name="lookalike.evaluate")
def evaluate(job_id: str) -> None:
    settings = get_settings()
    db = worker_database(settings.database_url)
    run(job_id, worker_name(), db, open_blobs(settings), settings)


def run(job_id: str, worker: str, db: Database, blobs: BlobStore, settings: Settings) -> None:
    """Carry out an evaluate job if it is still to be done; its end is written to the database."""
    carry_out(
        db,
        job_id,
        worker,
        settings.lease_seconds,
        lambda lease, hold: _evaluate(db, lease, hold, blobs, settings),
        lambda what: LookalikeError(
            f"The adapter could not be evaluated ({what}). The worker's log has the whole story."
        ),
    )


def _evaluate(
    db: Database, lease: Lease, hold: Hold, blobs: BlobStore, settings: Settings
) -> dict[str, Any] | None:
    """The job's result; None if it was stopped before."""
    started = time.monotonic()
    request = evaluation_request(db, lease.job_id, blobs, settings)
    folder = settings.runs / lease.job_id
    running = launch_module("lookalike_trainers.evaluation.process", request, folder)
    if not follow(db, blobs, lease, hold, running, settings, LookalikeError):
        return None
    figures: dict[str, Any] = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)  # all that is worth keeping goes into the job
    return {"figures": figures, "seconds": round(time.monotonic() - started, 3)}


def evaluation_request(
    db: Database, job_id: str, blobs: BlobStore, settings: Settings
) -> EvaluationRequest:
    """What the process is told.

    Raises InvalidRequest if the subject set is gone, or the base here is another.
    """
    with db.read_session() as session:
        job = session.get_one(Job, job_id)
        if job.subject_set_id is None:
            raise InvalidRequest(
                "The subject set has been deleted: upload photos of the subject, and name them as "
                "subject_set."
            )
        photos = [p.sha256 for p in subject_sets.images(session, job.subject_set_id) if p.sha256]
    asked = EvaluateJob.model_validate_json(json.dumps(job.request))
    return EvaluationRequest(
        **asked.model_dump(exclude={"adapters", "options"}),
        options=asked.options,
        adapter=registered_file(blobs, asked.adapters[0].ref, asked.adapters[0].digest),
        base_folder=resolve_base(job, settings).folder,
        photos=[blobs.path(digest) for digest in photos],
        clip_encoder=settings.clip_encoder,
        dino_encoder=settings.dino_encoder,
        cache=settings.cache,
        device=settings.device,
    )
