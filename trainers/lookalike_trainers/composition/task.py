"""The worker's task `lookalike.compose`: one merge, from claim to a registered version. Torch-free.

claim → preparing → composing → registering ─┬→ succeeded
                                             ├→ failed     the adapters cannot be merged
                                             ├→ canceled   its owner asked
                                             └→ queued     the worker shuts down

The trainers' worker does it, in a process of its own: it has the device that training had. A job
that comes back with a finished result only registers.
"""

import json
import shutil
import time
from typing import Any

from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.celery_app import app
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import AdapterVersion, Job
from lookalike_platform.errors import LookalikeError
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import Hold
from lookalike_platform.jobs.lease import Lease
from lookalike_platform.jobs.work import carry_out
from lookalike_platform.jobs.worker import worker_database, worker_name
from lookalike_platform.settings import Settings, get_settings
from lookalike_registry.check import registered_file
from lookalike_registry.manifest import Manifest
from lookalike_registry.mlflow_client import warm
from lookalike_registry.register import register
from lookalike_trainers.assignment import resolve_base
from lookalike_trainers.composition.record import manifest
from lookalike_trainers.composition.request import ComposeJob, CompositionRequest, ParentFile
from lookalike_trainers.following import follow
from lookalike_trainers.launcher import launch_module


@app.task(name="lookalike.compose")
def compose(job_id: str) -> None:
    settings = get_settings()
    db = worker_database(settings.database_url)
    run(job_id, worker_name(), db, open_blobs(settings), settings)


def run(job_id: str, worker: str, db: Database, blobs: BlobStore, settings: Settings) -> None:
    """Carry out a compose job if it is still to be done; its end is written to the database."""
    carry_out(
        db,
        job_id,
        worker,
        settings.lease_seconds,
        lambda lease, hold: _compose_and_register(db, lease, hold, blobs, settings),
        lambda what: LookalikeError(
            f"The adapters could not be merged ({what}). The worker's log has the whole story."
        ),
    )


def _compose_and_register(
    db: Database, lease: Lease, hold: Hold, blobs: BlobStore, settings: Settings
) -> dict[str, Any] | None:
    """The job's result; None if it was stopped before the adapter was finished."""
    started = time.monotonic()
    with db.read_session() as session:
        job = session.get_one(Job, lease.job_id)
    asked = ComposeJob.model_validate_json(json.dumps(job.request))
    base = resolve_base(job, settings)
    folder = settings.runs / lease.job_id
    result = folder / "result"
    if not (result / "result.json").exists():
        warm(settings)  # MLflow gets ready while the adapters are merged
        request = CompositionRequest(
            name=asked.name,
            strategy=asked.strategy,
            options=asked.options,
            parents=[
                ParentFile(
                    ref=parent.ref,
                    digest=parent.digest,
                    method=parent.method,
                    file=registered_file(blobs, parent.ref, parent.digest),
                    scale=parent.scale,
                    subjects=parent.subjects,
                )
                for parent in asked.adapters
            ],
            base_folder=base.folder,
            family=base.family,
            prediction_type=base.prediction_type,
            resolution=base.resolution,
            cache=settings.cache,
            device=settings.device,
        )
        running = launch_module("lookalike_trainers.composition.process", request, folder)
        if not follow(db, blobs, lease, hold, running, settings, LookalikeError):
            return None
    leases.advance(db, lease, "registering")
    with db.read_session() as session:
        parents = [session.get_one(AdapterVersion, parent.id).manifest for parent in asked.adapters]
    record = manifest(
        job, asked, [Manifest.model_validate(p) for p in parents], base, result, lease.attempt
    )
    # Another worker may have taken over while this one slept: its lease is asked once more.
    leases.renew(db, lease)
    weights = record.weights.file
    version = register(db, blobs, settings, record, {weights: result / weights}, [])
    shutil.rmtree(folder)  # a copy of the weights that would outlive the version
    return {
        "concept": version.concept,
        "version": version.version,
        "ref": version.ref,
        "digest": version.digest,
        "seconds": round(time.monotonic() - started, 3),
    }
