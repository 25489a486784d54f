"""Jobs for tests: submit them, and look at all that is known of one."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import select

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Attempt, Job, JobEvent, Outbox
from lookalike_platform.jobs import events, store


def submit(
    db: Database,
    kind: Literal["train", "generate", "evaluate", "compose"] = "train",
    owner: str = "local",
) -> str:
    """Queue a small job and return its id."""
    new = store.NewJob(
        owner=owner,
        kind=kind,
        base_model="pocket-64",
        base_fingerprint="f" * 64,
        request={"a": 1},
        method="lora" if kind == "train" else None,
        concept="dog" if kind == "train" else None,
    )
    with db.session() as session:
        return store.submit(session, new).id


@dataclass(frozen=True)
class Known:
    """A job with its history, its events and the message owed for it."""

    job: Job
    attempts: list[Attempt]
    events: list[JobEvent]
    outbox: Outbox

    @property
    def outcomes(self) -> list[str | None]:
        return [attempt.outcome for attempt in self.attempts]

    @property
    def states(self) -> list[str]:
        return [event.payload["state"] for event in self.events if event.type == "state"]


def look(db: Database, job_id: str) -> Known:
    with db.read_session() as session:
        attempts = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)
        return Known(
            job=session.get_one(Job, job_id),
            attempts=list(session.scalars(attempts)),
            events=events.read(session, job_id),
            outbox=session.scalars(select(Outbox).where(Outbox.job_id == job_id)).one(),
        )
