"""A worker's view of the process that does a job's work: what it says, when it is to stop.

Torch-free. What is said is passed on as the job's state, progress and events.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from celery import signals

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.errors import LookalikeError
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import Hold
from lookalike_platform.jobs.lease import Lease, LeaseLost
from lookalike_platform.settings import Settings
from lookalike_trainers.launcher import Launch

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
METRIC_SECONDS = 2.0
LOOK_SECONDS = 0.2
STOPPING_SECONDS = 120.0
"""How long a run may take to end after it was asked to, before it is killed."""

_shutting_down = threading.Event()


def follow(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    hold: Hold,
    running: Launch,
    settings: Settings,
    failed: type[LookalikeError],
) -> bool:
    """Pass on what the run says until it ends. Whether it completed; False if it was stopped.

    Nothing of its processes is left then, however this ends.

    Raises:
        failed: the run did.
        LeaseLost: the job is another worker's now.
    """
    try:
        return _pass_on(db, blobs, lease, hold, running, failed)
    finally:
        # A worker that shuts down has more patience.
        running.kill(grace=settings.stop_grace_seconds if _shutting_down.is_set() else 5.0)


def _pass_on(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    hold: Hold,
    running: Launch,
    failed: type[LookalikeError],
) -> bool:
    watcher = _Watcher(hold, running)
    watcher.start()
    reporter = _Reporter(db, blobs, lease)
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
        raise failed(_why(reporter.failure, running))
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

    def __init__(self, db: Database, blobs: BlobStore, lease: Lease) -> None:
        self.db, self.blobs, self.lease = db, blobs, lease
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
            case "message":
                self._message({"text": message["text"]})
            case "validation":
                picture = {"sha256": self.blobs.put_file(Path(message["file"]))}
                picture |= {key: message[key] for key in ("step", "prompt")}
                leases.event(self.db, self.lease, "image", picture)
            case "resumed":
                leases.resumed(self.db, self.lease, message["step"])
            case "done":
                self.outcome = message["outcome"]
            case "error" | "crash":
                self.failure = message

    def _stage(self, stage: str) -> None:
        if stage in ("training", "evaluating", "composing"):
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
        if "loss" in progress and (now - self._metric_at >= METRIC_SECONDS or last):
            self._metric_at = now
            point = {k: progress[k] for k in ("step", "loss", "learning_rate")}
            leases.event(self.db, self.lease, "metrics", point)

    def _message(self, payload: dict[str, Any]) -> None:
        leases.event(self.db, self.lease, "message", payload)


def _why(said: dict[str, Any] | None, running: Launch) -> str:
    """What went wrong, in the run's own words where it had time for any."""
    if said and said["type"] == "error":
        return str(said["problem"]["detail"])
    log.error("the run in %s ended; its log: %s", running.folder, running.log_tail(40))
    if said:
        return f"The process stopped ({said['detail']}); its log has the story."
    code = running.popen.returncode
    return (
        f"The process ended with code {code} and said nothing, most often because memory ran out: "
        "try a smaller batch_size or resolution, or gradient_checkpointing. The end of its log: "
        + running.log_tail(3)
    )


@signals.worker_shutting_down.connect
def _drain(**_: object) -> None:
    _shutting_down.set()
