"""A job's events: a page of them, or a server-sent stream that can be taken up where it broke.

https://html.spec.whatwg.org/multipage/server-sent-events.html; an event's id is its place in the
durable log, so `Last-Event-ID` replays exactly what was missed. Progress is sent as it changes,
without an id: it is a snapshot, and the next one replaces it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from lookalike_api.http.context import Context
from lookalike_api.http.shapes import Json, Moment, View
from lookalike_platform.db.tables import Job, JobEvent
from lookalike_platform.jobs import events, store
from lookalike_platform.jobs.states import TERMINAL

LOOK_SECONDS = 0.25
HEARTBEAT_SECONDS = 15.0
RETRY_MILLISECONDS = 1000
BATCH = 200


class EventView(View):
    seq: int
    type: Literal["state", "message", "metrics", "image"]
    level: Literal["info", "warning", "error"]
    payload: Json
    created_at: Moment


class EventPage(BaseModel):
    """`next_after`: ask for the events after this one next."""

    items: list[EventView]
    next_after: int


def page(context: Context, owner: str, job_id: str, after: int, limit: int) -> EventPage:
    """Up to `limit` of the job's events after `after`. Raises NotFound."""
    with context.db.read_session() as session:
        store.get(session, owner, job_id)
        found = [EventView.model_validate(e) for e in events.read(session, job_id, after, limit)]
    return EventPage(items=found, next_after=found[-1].seq if found else after)


async def stream(context: Context, owner: str, job_id: str, after: int) -> Response:
    """The job's events after `after`, until its end. Raises NotFound.

    A stream of a finished job with nothing left to say is answered 204, which tells an
    EventSource not to connect again.
    """
    job, fresh = await run_in_threadpool(_look, context, owner, job_id, after)
    if job.state in TERMINAL and not fresh:
        return Response(status_code=204)
    return StreamingResponse(
        _lines(context, owner, job_id, after),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _lines(context: Context, owner: str, job_id: str, after: int) -> AsyncIterator[str]:
    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    shown: dict[str, Any] = {}
    spoke_at = time.monotonic()
    while not context.stopping():
        job, fresh = await run_in_threadpool(_look, context, owner, job_id, after)
        for event in fresh:
            after = event.seq
            data = EventView.model_validate(event).model_dump_json()
            yield f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n"
        if job.state in TERMINAL and len(fresh) < BATCH:
            return
        progress = {"state": job.state, **job.progress}
        if job.progress and progress != shown:
            shown = progress
            data = json.dumps({"type": "progress", "payload": progress})
            yield f"event: progress\ndata: {data}\n\n"
            spoke_at = time.monotonic()
        if fresh:
            spoke_at = time.monotonic()
        elif time.monotonic() - spoke_at >= HEARTBEAT_SECONDS:
            yield ": heartbeat\n\n"
            spoke_at = time.monotonic()
        if len(fresh) < BATCH:
            await asyncio.sleep(LOOK_SECONDS)


def _look(context: Context, owner: str, job_id: str, after: int) -> tuple[Job, list[JobEvent]]:
    with context.db.read_session() as session:
        # The job first: when it is finished, its last event is there too.
        job = store.get(session, owner, job_id)
        return job, events.read(session, job_id, after, BATCH)
