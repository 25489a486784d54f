"""Is the API alive, and can it take work? `healthz` asks nobody; `readyz` asks everybody."""

import time
from typing import Literal

from fastapi import APIRouter
from kombu import Connection
from pydantic import BaseModel
from sqlalchemy import func, select

from lookalike_api.http.context import Context, Lookalike
from lookalike_api.http.problems import NotReady, documented
from lookalike_platform.celery_app import configuration
from lookalike_platform.db.engine import schema_revision
from lookalike_platform.db.tables import Job
from lookalike_platform.jobs.states import QUEUED, QUEUES, TERMINAL
from lookalike_platform.settings import Settings

router = APIRouter(tags=["health"])

BROKER_SECONDS = 3.0


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class QueueView(BaseModel):
    """Work waiting, and workers seen at work: those whose lease on a job is good.

    Idle workers say nothing; that there are none shows in how long the oldest job has waited.
    """

    queued: int
    oldest_seconds: float | None
    running: int
    workers: list[str]


class Readiness(BaseModel):
    status: Literal["ok"] = "ok"
    schema_revision: str
    broker: str
    queues: dict[str, QueueView]


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=documented(503))
def readyz(context: Lookalike) -> Readiness:
    """Database and broker answer, and the tables are there."""
    revision = _revision(context.settings)
    broker = _broker(context.settings)
    queues = {queue: _queue(context, kind) for kind, queue in QUEUES.items()}
    return Readiness(schema_revision=revision, broker=broker, queues=queues)


def _revision(settings: Settings) -> str:
    try:
        revision = schema_revision(settings.database_url)
    except Exception as error:
        raise NotReady(
            f"The database does not answer ({_first_line(error)}). See LOOKALIKE_DATABASE_URL."
        ) from error
    if revision is None:
        raise NotReady("The database has no tables yet. Run: lookalike migrate")
    return revision


def _broker(settings: Settings) -> str:
    wanted = configuration(settings)
    options = wanted["broker_transport_options"]
    with Connection(settings.broker_url, transport_options=options) as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=BROKER_SECONDS)
            connection.default_channel  # noqa: B018 - the embedded transport connects only here
        except Exception as error:
            raise NotReady(
                f"The broker does not answer ({_first_line(error)}). See LOOKALIKE_BROKER_URL."
            ) from error
        return connection.transport_cls if isinstance(connection.transport_cls, str) else "sqla"


def _queue(context: Context, kind: str) -> QueueView:
    now = time.time()
    with context.db.read_session() as session:
        waiting = select(func.count(), func.min(Job.created_at)).where(
            Job.kind == kind, Job.state == QUEUED
        )
        queued, oldest = session.execute(waiting).one()
        running = session.scalars(
            select(Job.lease_owner).where(
                Job.kind == kind,
                Job.state.not_in([QUEUED, *TERMINAL]),
                Job.lease_expires > now,
            )
        ).all()
    return QueueView(
        queued=queued,
        oldest_seconds=round(now - oldest, 3) if oldest is not None else None,
        running=len(running),
        workers=sorted({worker for worker in running if worker}),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
