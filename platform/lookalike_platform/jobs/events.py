"""The durable event log of a job: what happened to it, in order, readable from any point."""

import time
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_platform.db.tables import JobEvent

Level = Literal["info", "warning", "error"]
EventType = Literal["state", "message", "metrics", "image"]


def append(
    session: Session,
    job_id: str,
    type: EventType,
    payload: dict[str, Any],
    level: Level = "info",
) -> None:
    """Add an event in the caller's transaction, which holds the job's row or has just made it.

    Holding the row keeps the sequence numbers of one job in the order of their commits, so that a
    reader who has seen event n never misses one before it.
    """
    session.add(
        JobEvent(job_id=job_id, created_at=time.time(), level=level, type=type, payload=payload)
    )
    session.flush()


def read(session: Session, job_id: str, after: int = 0, limit: int = 100) -> list[JobEvent]:
    """Up to `limit` events of a job with `seq` above `after`, oldest first."""
    query = (
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.seq > after)
        .order_by(JobEvent.seq)
        .limit(limit)
    )
    return list(session.scalars(query))
