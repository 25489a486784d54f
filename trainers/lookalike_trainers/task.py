"""The worker's task `lookalike.train`: one training job, from claim to a registered version.

claim → preparing → training → evaluating → registering ─┬→ succeeded
                                                         ├→ failed     cause and remedy in the error
                                                         ├→ canceled   its owner asked
                                                         └→ queued     the worker shuts down

Torch-free: training happens in processes of its own. A job that comes back, after a crash or a
shutdown, finds its run folder and goes on from there; with a finished result it only registers.
"""

import json
from pathlib import Path
from typing import Any

from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.celery_app import app
from lookalike_platform.db.engine import Database
from lookalike_platform.errors import TrainingFailed
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import Hold
from lookalike_platform.jobs.lease import Lease
from lookalike_platform.jobs.work import carry_out
from lookalike_platform.jobs.worker import worker_database, worker_name
from lookalike_platform.settings import Settings, get_settings
from lookalike_registry.mlflow_client import warm
from lookalike_registry.register import register
from lookalike_trainers.assignment import Assignment, assignment, manifest, run_request
from lookalike_trainers.following import follow
from lookalike_trainers.launcher import launch


@app.task(name="lookalike.train")
def train(job_id: str) -> None:
    settings = get_settings()
    db = worker_database(settings.database_url)
    run(job_id, worker_name(), db, open_blobs(settings), settings)


def run(job_id: str, worker: str, db: Database, blobs: BlobStore, settings: Settings) -> None:
    """Carry out a training job if it is still to be done; its end is written to the database."""
    carry_out(
        db,
        job_id,
        worker,
        settings.lease_seconds,
        lambda lease, hold: _train_and_register(db, lease, hold, blobs, settings),
        lambda what: TrainingFailed(
            f"The job stopped for a reason that was not foreseen ({what}). The worker's log has "
            "the whole story."
        ),
    )


def _train_and_register(
    db: Database, lease: Lease, hold: Hold, blobs: BlobStore, settings: Settings
) -> dict[str, Any] | None:
    """The job's result; None if it was stopped before its adapter was finished."""
    job = assignment(db, lease.job_id)
    folder = settings.runs / lease.job_id
    summary = folder / "result" / "result.json"
    if not summary.exists():
        warm(settings)  # MLflow gets ready while the run trains
        running = launch(run_request(job, blobs, settings), folder)
        if not follow(db, blobs, lease, hold, running, settings, TrainingFailed):
            return None
    leases.advance(db, lease, "registering")
    return _register(db, lease, job, folder / "result", blobs, settings)


def _register(
    db: Database,
    lease: Lease,
    job: Assignment,
    result: Path,
    blobs: BlobStore,
    settings: Settings,
) -> dict[str, Any]:
    record = manifest(job, result, lease.attempt, settings)
    metrics = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    files = {
        path.name: path
        for path in sorted(result.iterdir())
        if path.is_file() and path.name != "result.json"
    }
    # Another worker may have taken over while this one slept: its lease is asked once more.
    leases.renew(db, lease)
    version = register(db, blobs, settings, record, files, metrics)
    return {
        "concept": version.concept,
        "version": version.version,
        "ref": version.ref,
        "digest": version.digest,
        "final_loss": metrics[-1]["loss"],
    }
