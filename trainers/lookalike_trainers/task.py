"""The worker's task `lookalike.train`: one training job, from claim to a registered version.

claim → preparing → training → evaluating → registering ─┬→ succeeded
                                                         ├→ failed     cause and remedy in the error
                                                         ├→ canceled   its owner asked
                                                         └→ queued     the worker shuts down

Torch-free: training happens in processes of its own. A job that comes back, after a crash or a
shutdown, finds its run folder and goes on from there; with a finished result it only registers.
"""

import json
import logging
import os
import socket
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from celery import signals

from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.celery_app import app
from lookalike_platform.db.engine import Database, open_database
from lookalike_platform.errors import LookalikeError, TrainingFailed
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import Hold, held
from lookalike_platform.jobs.lease import Lease, LeaseLost
from lookalike_platform.settings import Settings, get_settings
from lookalike_registry.mlflow_client import warm
from lookalike_registry.register import register
from lookalike_trainers.assignment import Assignment, assignment, manifest, run_request
from lookalike_trainers.launcher import Launch, launch

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
METRIC_SECONDS = 2.0
LOOK_SECONDS = 0.2
STOPPING_SECONDS = 120.0
"""How long a run may take to end after it was asked to, before it is killed."""

_shutting_down = threading.Event()


@app.task(name="lookalike.train")
def train(job_id: str) -> None:
    settings = get_settings()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    run(job_id, worker, _database(settings.database_url), open_blobs(settings), settings)


def run(job_id: str, worker: str, db: Database, blobs: BlobStore, settings: Settings) -> None:
    """Carry out a training job if it is still to be done; its end is written to the database."""
    lease = leases.claim(db, job_id, worker, settings.lease_seconds)
    if lease is None:
        return
    try:
        _carry_out(db, lease, blobs, settings)
    except LeaseLost:
        log.warning("%s went on elsewhere; leaving it alone", job_id)


def _carry_out(db: Database, lease: Lease, blobs: BlobStore, settings: Settings) -> None:
    try:
        with held(db, lease) as hold:
            result = _train_and_register(db, lease, hold, blobs, settings)
    except LeaseLost:
        raise
    except LookalikeError as error:
        leases.fail(db, lease, error.problem())
    except Exception as error:
        log.exception("%s failed", lease.job_id)
        unexpected = TrainingFailed(
            f"The job stopped for a reason that was not foreseen ({type(error).__name__}: {error})."
            " The worker's log has the whole story."
        )
        leases.fail(db, lease, unexpected.problem())
    else:
        if result is not None:
            leases.succeed(db, lease, result)
        elif hold.cancel_requested:
            leases.cancel(db, lease)
        else:
            leases.release(db, lease)


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
        try:
            if not _follow(db, lease, hold, running):
                return None
        finally:
            running.kill(grace=settings.stop_grace_seconds if _shutting_down.is_set() else 5.0)
    leases.advance(db, lease, "registering")
    return _register(db, lease, job, folder / "result", blobs, settings)


def _follow(db: Database, lease: Lease, hold: Hold, running: Launch) -> bool:
    """Pass on what the run says until it ends. Whether it completed; False if it was stopped.

    Raises:
        LookalikeError: the run failed.
        LeaseLost: the job is another worker's now.
    """
    watcher = _Watcher(hold, running)
    watcher.start()
    reporter = _Reporter(db, lease)
    try:
        for message in running.messages():
            reporter.tell(message)
    finally:
        watcher.done.set()
        watcher.join()
    if hold.lost:
        raise LeaseLost(f"the lease of {lease.job_id} ran out")
    if reporter.outcome is None and watcher.asked_to_stop:
        return False  # it did not get to say so, and was killed
    if reporter.outcome is None:
        raise _failure(reporter.failure, running)
    return reporter.outcome == "complete"


class _Watcher(threading.Thread):
    """Asks the run to stop when its owner or the worker's shutdown wants it, kills it if it won't.

    A run whose lease is lost is killed at once: another worker may be at its folder already.
    """

    def __init__(self, hold: Hold, running: Launch) -> None:
        super().__init__(name="watch", daemon=True)
        self.hold, self.running = hold, running
        self.done = threading.Event()
        self.asked_to_stop = False

    def run(self) -> None:
        asked_at = 0.0
        while not self.done.wait(LOOK_SECONDS):
            if self.hold.lost:
                self.running.kill(grace=0)
                return
            wanted = self.hold.cancel_requested or _shutting_down.is_set()
            if wanted and not self.asked_to_stop:
                self.running.ask_to_stop("cancel" if self.hold.cancel_requested else "drain")
                self.asked_to_stop, asked_at = True, time.monotonic()
            if self.asked_to_stop and time.monotonic() - asked_at > STOPPING_SECONDS:
                self.running.kill(grace=1)
                return


class _Reporter:
    """Turns what rank 0 says into the job's state, progress and events."""

    def __init__(self, db: Database, lease: Lease) -> None:
        self.db, self.lease = db, lease
        self.outcome: str | None = None
        self.failure: dict[str, Any] | None = None
        self._progress_at = self._metric_at = 0.0

    def tell(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "stage":
                self._stage(message["stage"])
            case "progress":
                self._progress(message)
            case "checkpoint":
                text = f"checkpoint of step {message['step']}"
                self._message({"text": text, "step": message["step"]})
            case "resumed":
                leases.resumed(self.db, self.lease, message["step"])
            case "done":
                self.outcome = message["outcome"]
            case "error" | "crash":
                self.failure = message

    def _stage(self, stage: str) -> None:
        if stage in ("training", "evaluating"):
            leases.advance(self.db, self.lease, stage)
        else:
            words = {"caching": "looking at the photos", "prior": "drawing class images"}
            self._message({"text": words.get(stage, stage), "stage": stage})

    def _progress(self, message: dict[str, Any]) -> None:
        progress = {k: v for k, v in message.items() if k != "type"}
        now, last = time.monotonic(), message["step"] == message["total"]
        if now - self._progress_at >= PROGRESS_SECONDS or last:
            self._progress_at = now
            leases.progress(self.db, self.lease, progress)
        if now - self._metric_at >= METRIC_SECONDS or last:
            self._metric_at = now
            point = {k: progress[k] for k in ("step", "loss", "learning_rate")}
            leases.event(self.db, self.lease, "metrics", point)

    def _message(self, payload: dict[str, Any]) -> None:
        leases.event(self.db, self.lease, "message", payload)


def _failure(said: dict[str, Any] | None, running: Launch) -> LookalikeError:
    """What went wrong, in the run's own words where it had time for any."""
    if said and said["type"] == "error":
        return TrainingFailed(said["problem"]["detail"])
    log.error("the run in %s ended; its log: %s", running.folder, running.log_tail(40))
    if said:
        return TrainingFailed(f"The trainer stopped ({said['detail']}); its log has the story.")
    code = running.popen.returncode
    return TrainingFailed(
        f"The trainer ended with code {code} and said nothing, most often because memory ran out: "
        "try a smaller batch_size or resolution, or gradient_checkpointing. The end of its log: "
        + running.log_tail(3)
    )


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
        "ref": f"{version.concept}@{version.version}",
        "digest": version.digest,
        "final_loss": metrics[-1]["loss"],
    }


@signals.worker_shutting_down.connect
def _drain(**_: object) -> None:
    _shutting_down.set()


@cache
def _database(url: str) -> Database:
    return open_database(url)
