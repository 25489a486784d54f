"""The reaper: gives jobs of lost workers back to the queue, and lost messages to the broker.

It also ends what nobody took in time: jobs whose request has a `deadline_seconds`.
"""

from dataclasses import dataclass

from sqlalchemy import func, select, update

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Attempt, Job, Outbox
from lookalike_platform.errors import LookalikeError, TooLate
from lookalike_platform.jobs import lease, states

RESEND_SECONDS = (60.0, 900.0)
"""How long a queued job waits for its message to be taken before it is sent again.

At first the lower bound; then as long as the message has waited already, up to the upper bound, so
that a long queue does not fill with duplicates. Sending too early is harmless.
"""


LATE = (
    "The job was not begun by its deadline: too much else was waiting. Submit it again, or give it "
    "more time with `deadline_seconds`."
)


@dataclass(frozen=True)
class Reaped:
    """How many jobs went back to the queue, ended, or had their message sent again."""

    requeued: int = 0
    ended: int = 0
    resent: int = 0


def reap(db: Database, now: float, max_attempts: int) -> Reaped:
    """One round. Safe to run in several processes at once.

    A job whose lease expired by `now` is queued again; canceled, if its owner asked for that; or
    failed, if it has now lost `max_attempts` workers. Drained attempts do not count.
    """
    with db.read_session() as session:
        expired = select(Job.id).where(
            Job.state.not_in([states.QUEUED, *states.TERMINAL]), Job.lease_expires < now
        )
        job_ids = session.scalars(expired).all()
    outcomes = [_take_back(db, job_id, now, max_attempts) for job_id in job_ids]
    outcomes += _end_late(db, now)
    return Reaped(
        requeued=outcomes.count(states.QUEUED),
        ended=sum(outcome in states.TERMINAL for outcome in outcomes),
        resent=_resend(db, now),
    )


def _take_back(db: Database, job_id: str, now: float, max_attempts: int) -> str | None:
    """The state the job goes to; None if its worker renewed the lease meanwhile."""
    with db.session() as session:
        expired = (
            update(Job)
            .where(
                Job.id == job_id,
                Job.state.not_in([states.QUEUED, *states.TERMINAL]),
                Job.lease_expires < now,
            )
            .values(lease_owner=None)
            .returning(Job)
        )
        job = session.scalar(expired)
        if job is None:
            return None
        lease.end_attempt(session, job, "lost")
        session.flush()
        lost = select(func.count()).where(Attempt.job_id == job_id, Attempt.outcome == "lost")
        times = session.scalar(lost) or 0
        if job.cancel_requested:
            lease.finish(session, job, states.CANCELED)
        elif times >= max_attempts:
            lease.finish(session, job, states.FAILED, error=_lost(times).problem())
        else:
            lease.requeue(session, job, f"the worker was lost in {job.state}")
        return job.state


def _end_late(db: Database, now: float) -> list[str]:
    """Fail jobs that are still queued at their deadline; one with progress was begun before."""
    allowed = Job.request["deadline_seconds"].as_float()
    late = (
        Job.state == states.QUEUED,
        Job.created_at + allowed < now,
        Job.progress["step"].as_string().is_(None),
    )
    with db.read_session() as session:
        job_ids = session.scalars(select(Job.id).where(*late)).all()
    for job_id in job_ids:
        with db.session() as session:
            still = update(Job).where(Job.id == job_id, *late).values(lease_owner=None)
            job = session.scalar(still.returning(Job))
            if job is not None:
                lease.finish(session, job, states.FAILED, error=TooLate(LATE).problem())
    return [states.FAILED for _ in job_ids]


def _lost(times: int) -> LookalikeError:
    return LookalikeError(
        f"worker lost {times} times: the process running this job disappeared at each attempt, "
        "most often because memory ran out, or could not reach its database. Look at the worker's "
        "log, ask for less (a smaller batch_size or resolution, gradient_checkpointing), then "
        "submit the job again; LOOKALIKE_MAX_ATTEMPTS sets how often a job is tried."
    )


def _resend(db: Database, now: float) -> int:
    """Owe again the messages of jobs still queued long after they were sent."""
    soonest, latest = RESEND_SECONDS
    with db.read_session() as session:
        waiting = (
            select(Outbox.id, Outbox.created_at, Outbox.published_at)
            .join(Job, Job.id == Outbox.job_id)
            .where(Job.state == states.QUEUED, Outbox.published_at < now - soonest)
        )
        due = [
            row.id
            for row in session.execute(waiting)
            if now - row.published_at >= min(row.published_at - row.created_at, latest)
        ]
    for outbox_id in due:
        with db.session() as session:
            owed = update(Outbox).where(Outbox.id == outbox_id)
            session.execute(owed.values(published_at=None))
    return len(due)
