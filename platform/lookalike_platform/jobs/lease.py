"""A worker's hold on a job.

`claim` gives one worker the job for a while and raises the job's fence by one. Every later write
is a compare-and-set on that fence, so a worker that lost its lease (it hung, the machine slept,
the network broke) can change nothing any more: it gets LeaseLost and must stop.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.orm import Session

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Attempt, Job, Outbox
from lookalike_platform.errors import Conflict
from lookalike_platform.jobs import events, states
from lookalike_platform.jobs.events import EventType, Level


class LeaseLost(Exception):
    """The job is no longer this worker's: stop working on it and write nothing."""


@dataclass(frozen=True)
class Lease:
    """Proof of a claim: the `fence`-th of this job, good for `seconds` from its last renewal."""

    job_id: str
    fence: int
    attempt: int
    worker: str
    seconds: float


def claim(db: Database, job_id: str, worker: str, lease_seconds: float) -> Lease | None:
    """Take a queued job. None if it is not queued: taken by another, finished, or unknown."""
    now = time.time()
    with db.session() as session:
        take = (
            update(Job)
            .where(Job.id == job_id, Job.state == states.QUEUED)
            .values(
                state=states.PREPARING,
                fence=Job.fence + 1,
                attempt=Job.attempt + 1,
                lease_owner=worker,
                lease_expires=now + lease_seconds,
                started_at=func.coalesce(Job.started_at, now),
            )
            .returning(Job.fence, Job.attempt)
        )
        taken = session.execute(take).one_or_none()
        if taken is None:
            return None
        lease = Lease(job_id, taken.fence, taken.attempt, worker, lease_seconds)
        session.add(Attempt(job_id=job_id, number=lease.attempt, worker=worker, started_at=now))
        state = {"state": states.PREPARING, "attempt": lease.attempt, "worker": worker}
        events.append(session, job_id, "state", state)
        return lease


def renew(db: Database, lease: Lease) -> bool:
    """Hold the job for another `lease.seconds`. Returns whether its owner asked to cancel it."""
    with _held(db, lease, lease_expires=time.time() + lease.seconds) as (_, job):
        return job.cancel_requested


def advance(db: Database, lease: Lease, state: str) -> None:
    """Move the job forwards to a later running state; staying where it is changes nothing.

    Raises Conflict for a step backwards or a state the kind of job does not have.
    """
    with _held(db, lease) as (session, job):
        if job.state == state:
            return
        if not states.is_forward(job.kind, job.state, state):
            raise Conflict(f"a {job.kind} job cannot go from {job.state} to {state}")
        job.state = state
        events.append(session, job.id, "state", {"state": state, "attempt": lease.attempt})


def progress(db: Database, lease: Lease, progress: dict[str, Any]) -> None:
    """Replace the job's progress: step, total, loss, rate, seconds left."""
    with _held(db, lease) as (_, job):
        job.progress = progress


def event(
    db: Database,
    lease: Lease,
    type: EventType,
    payload: dict[str, Any],
    level: Level = "info",
) -> None:
    """Add to the job's event log."""
    with _held(db, lease) as (session, job):
        events.append(session, job.id, type, payload, level)


def resumed(db: Database, lease: Lease, step: int) -> None:
    """Note in the attempt's history that it went on from a checkpoint."""
    with _held(db, lease) as (session, job):
        _attempt(session, lease).resumed_step = step
        text = f"resumed from the checkpoint of step {step}"
        events.append(session, job.id, "message", {"text": text, "step": step})


def succeed(db: Database, lease: Lease, result: dict[str, Any]) -> None:
    """End the job with its result."""
    _finish(db, lease, states.SUCCEEDED, result=result)


def fail(db: Database, lease: Lease, error: dict[str, Any]) -> None:
    """End the job with an error, as the problem document shown to its owner."""
    _finish(db, lease, states.FAILED, error=error)


def cancel(db: Database, lease: Lease) -> None:
    """End the job as its owner asked."""
    _finish(db, lease, states.CANCELED)


def release(db: Database, lease: Lease) -> None:
    """Give the job back to the queue: this worker shuts down. Not counted against the job.

    A job whose owner asked to cancel it ends as canceled instead.
    """
    with _held(db, lease) as (session, job):
        end_attempt(session, job, "drained")
        if job.cancel_requested:
            finish(session, job, states.CANCELED)
        else:
            requeue(session, job, "the worker shut down")


def _finish(db: Database, lease: Lease, state: str, **values: Any) -> None:
    with _held(db, lease) as (session, job):
        end_attempt(session, job, state)
        finish(session, job, state, **values)


# What a lease and the reaper both do to a job whose row they hold.


def finish(session: Session, job: Job, state: str, **values: Any) -> None:
    """Put a job into a terminal state."""
    for name, value in values.items():
        setattr(job, name, value)
    job.state = state
    job.finished_at = time.time()
    job.lease_owner = job.lease_expires = None
    payload = {"state": state, "attempt": job.attempt}
    if job.error is not None:
        payload["error"] = job.error
    events.append(session, job.id, "state", payload, "error" if state == states.FAILED else "info")


def requeue(session: Session, job: Job, reason: str) -> None:
    """Put a running job back into the queue and owe the broker its message again."""
    job.state = states.QUEUED
    job.lease_owner = job.lease_expires = None
    owed = update(Outbox).where(Outbox.job_id == job.id)
    session.execute(owed.values(created_at=time.time(), published_at=None))
    payload = {"state": states.QUEUED, "attempt": job.attempt, "reason": reason}
    events.append(session, job.id, "state", payload, "warning")


def end_attempt(session: Session, job: Job, outcome: str) -> None:
    """Close the history entry of the job's current attempt."""
    attempt = session.get_one(Attempt, (job.id, job.attempt))
    attempt.ended_at, attempt.outcome = time.time(), outcome


def _attempt(session: Session, lease: Lease) -> Attempt:
    return session.get_one(Attempt, (lease.job_id, lease.attempt))


@contextmanager
def _held(db: Database, lease: Lease, **values: Any) -> Iterator[tuple[Session, Job]]:
    """A transaction on the leased job. Raises LeaseLost unless the fence is the job's own.

    The compare-and-set locks the row, so the fence still holds when the transaction commits.
    """
    with db.session() as session:
        held = (
            update(Job)
            .where(
                Job.id == lease.job_id,
                Job.fence == lease.fence,
                Job.lease_owner == lease.worker,
                Job.state.not_in([states.QUEUED, *states.TERMINAL]),
            )
            .values(fence=lease.fence, **values)
            .returning(Job)
        )
        job = session.scalar(held)
        if job is None:
            raise LeaseLost(f"{lease.worker} no longer holds {lease.job_id}")
        yield session, job
