"""Jobs as their owner sees them: submit, look up, list, ask to cancel."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from lookalike_platform.db.pages import page_of
from lookalike_platform.db.tables import Job, Outbox
from lookalike_platform.errors import FieldProblem, InvalidRequest, NotFound
from lookalike_platform.ids import new_id
from lookalike_platform.jobs import events, states


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a job is made of. `request` is the whole validated request, as JSON."""

    owner: str
    kind: Literal["train", "generate", "evaluate", "compose"]
    base_model: str
    base_fingerprint: str
    request: dict[str, Any]
    method: str | None = None
    concept: str | None = None
    subject_set_id: str | None = None


def submit(session: Session, new: NewJob) -> Job:
    """Queue a job: its row, the message owed for it and its first event, in one transaction.

    The relay sends the message after the commit, so an accepted job is never lost.

    Raises InvalidRequest for a text with U+0000 in it. PostgreSQL keeps that in JSON, but answers
    no question about such JSON: one job's would stop every query that looks into requests.
    """
    for path in _with_nul(new.request):
        problem = FieldProblem(path, "has the character U+0000: leave it out")
        raise InvalidRequest("The request has a text that cannot be kept.", [problem])
    now = time.time()
    job = Job(
        id=new_id("job"),
        owner=new.owner,
        kind=new.kind,
        method=new.method,
        concept=new.concept,
        subject_set_id=new.subject_set_id,
        base_model=new.base_model,
        base_fingerprint=new.base_fingerprint,
        request=new.request,
        state=states.QUEUED,
        attempt=0,
        fence=0,
        cancel_requested=False,
        progress={},
        created_at=now,
    )
    session.add(job)
    session.flush()
    session.add(Outbox(job_id=job.id, queue=states.QUEUES[new.kind], created_at=now))
    events.append(session, job.id, "state", {"state": states.QUEUED})
    return job


def _with_nul(value: Any, path: str = "") -> Iterator[str]:
    """Where in a request there are texts with U+0000."""
    if isinstance(value, str) and "\0" in value:
        yield path
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _with_nul(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _with_nul(each, f"{path}[{place}]")


def get(session: Session, owner: str, id: str) -> Job:
    """The owner's job, as the database has it now. Raises NotFound, also for another owner's."""
    query = select(Job).where(Job.id == id, Job.owner == owner)
    job = session.scalar(query.execution_options(populate_existing=True))
    if job is None:
        raise NotFound(f"there is no job {id!r}; GET /v1/jobs lists those there are")
    return job


def list_jobs(
    session: Session,
    owner: str,
    *,
    state: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[Job], str | None]:
    """A page of the owner's jobs, newest first, and the cursor of the next page if there is one.

    Raises InvalidRequest for a state, kind or cursor that cannot be.
    """
    if state is not None and state not in states.ALL:
        raise InvalidRequest(f"no job state {state!r}; states are {', '.join(states.ALL)}")
    if kind is not None and kind not in states.QUEUES:
        raise InvalidRequest(f"no kind of job {kind!r}; kinds are {', '.join(states.QUEUES)}")
    wanted = [Job.owner == owner]
    if state is not None:
        wanted.append(Job.state == state)
    if kind is not None:
        wanted.append(Job.kind == kind)
    if method is not None:
        wanted.append(Job.method == method)
    return page_of(session, Job, *wanted, prefix="job_", cursor=cursor, limit=limit)


def request_cancel(
    session: Session, owner: str, id: str
) -> Literal["canceled", "requested", "finished"]:
    """Cancel a queued job at once; ask the worker of a running one; leave a finished one alone.

    Each step is a compare-and-set, so a worker that claims the job meanwhile is asked instead.
    Raises NotFound.
    """
    get(session, owner, id)
    now = time.time()
    queued = update(Job).where(Job.id == id, Job.state == states.QUEUED)
    if _changed(session, queued.values(state=states.CANCELED, finished_at=now)):
        events.append(session, id, "state", {"state": states.CANCELED})
        return "canceled"
    running = update(Job).where(Job.id == id, Job.state.not_in(states.TERMINAL))
    asked_before = running.where(Job.cancel_requested)
    if _changed(session, asked_before.values(cancel_requested=True)):
        return "requested"
    if _changed(session, running.values(cancel_requested=True)):
        events.append(session, id, "message", {"text": "cancellation requested"})
        return "requested"
    return "finished"


def _changed(session: Session, statement: Any) -> bool:
    result = session.execute(statement.execution_options(synchronize_session="fetch"))
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)
