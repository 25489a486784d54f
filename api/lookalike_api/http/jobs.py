"""Jobs: submit a training, follow any job, cancel it."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from lookalike_api.http import events, submission
from lookalike_api.http.context import Id, IdempotencyKey, Lookalike, Owner
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Json, Moment, Page, Paging, Parameters, View
from lookalike_api.http.training import JobRequest, admit, complete_config
from lookalike_platform.db.tables import Attempt, JobEvent
from lookalike_platform.errors import NotFound
from lookalike_platform.jobs import store
from lookalike_trainers.cost import Cost

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class JobView(View):
    """A job. `progress`: step, total, loss, steps_per_second, seconds_left, as far as known.

    `error` is the problem a failed job ended with; `result` what a finished one made.
    """

    id: str
    kind: Literal["train", "generate", "evaluate", "compose"]
    state: str
    method: str | None
    concept: str | None
    subject_set: str | None = Field(validation_alias=AliasChoices("subject_set_id", "subject_set"))
    base_model: str
    base_fingerprint: str
    request: Json
    attempt: int
    cancel_requested: bool
    progress: Json
    result: Json | None
    error: Json | None
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None


class JobPage(Page):
    items: list[JobView]


class JobFilters(Paging):
    state: str | None = Field(default=None, pattern=r"^\w{1,40}$")
    kind: Literal["train", "generate", "evaluate", "compose"] | None = None
    method: str | None = Field(default=None, pattern=r"^[\w-]{1,40}$")


class EventRange(Parameters):
    after: int = Field(default=0, ge=0, lt=2**62)
    limit: int = Field(default=100, ge=1, le=1000)


class DryRun(Parameters):
    dry_run: bool = Field(default=False, description="check and estimate only; queue nothing")


class Cancellation(BaseModel):
    """`canceled`: it had not begun. `requested`: its worker stops it soon. `finished`: too late."""

    outcome: Literal["canceled", "requested", "finished"]
    job: JobView


class AttemptView(View):
    """One worker's try. `resumed_step`: the checkpoint it went on from."""

    number: int
    worker: str
    started_at: Moment
    ended_at: Moment | None
    resumed_step: int | None
    outcome: str | None


class Attempts(BaseModel):
    items: list[AttemptView]


@router.post(
    "",
    status_code=202,
    response_model=JobView,
    responses={200: {"model": Cost, "description": "dry run"}, **documented(413, 422)},
)
def submit_job(
    context: Lookalike,
    owner: Owner,
    wanted: JobRequest,
    query: Annotated[DryRun, Query()],
    key: IdempotencyKey = None,
) -> Response:
    """Queue a training job; with `dry_run` only say what it would cost."""
    if query.dry_run:
        with context.db.session() as session:
            config = complete_config(session, context.settings, owner, wanted)
            _, cost = admit(session, context.settings, owner, wanted, config)
        return JSONResponse(asdict(cost))

    def queue(session: Session) -> Json:
        config = complete_config(session, context.settings, owner, wanted)
        new, _ = admit(session, context.settings, owner, wanted, config)
        return JobView.model_validate(store.submit(session, new)).model_dump(mode="json")

    asked = {"job": wanted.model_dump(mode="json")}
    return submission.respond(submission.submit(context, owner, key, asked, queue), "/v1/jobs")


@router.get("", responses=documented(422))
def list_jobs(context: Lookalike, owner: Owner, filters: Annotated[JobFilters, Query()]) -> JobPage:
    """The jobs of all kinds, newest first."""
    with context.db.read_session() as session:
        jobs, cursor = store.list_jobs(session, owner, **filters.model_dump())
        views = [JobView.model_validate(job) for job in jobs]
        return JobPage(items=views, next_cursor=cursor)


@router.get("/{job_id}", responses=documented(404, 422))
def get_job(context: Lookalike, owner: Owner, job_id: Id) -> JobView:
    with context.db.read_session() as session:
        return JobView.model_validate(store.get(session, owner, job_id))


@router.get("/{job_id}/attempts", responses=documented(404, 422))
def list_attempts(context: Lookalike, owner: Owner, job_id: Id) -> Attempts:
    """Every worker that had the job, oldest first."""
    with context.db.read_session() as session:
        store.get(session, owner, job_id)
        rows = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)
        found = session.scalars(rows)
        return Attempts(items=[AttemptView.model_validate(attempt) for attempt in found])


@router.get(
    "/{job_id}/images/{sha256}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 422)},
)
def get_image(context: Lookalike, owner: Owner, job_id: Id, sha256: Digest) -> Response:
    """A validation picture, as an event of type `image` names it."""
    with context.db.read_session() as session:
        store.get(session, owner, job_id)
        images = select(JobEvent.payload).where(JobEvent.job_id == job_id, JobEvent.type == "image")
        if sha256 not in {payload["sha256"] for payload in session.scalars(images)}:
            raise NotFound(f"{job_id} has no picture {sha256}; its events of type image name them.")
    headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
    return Response(context.blobs.get(sha256), media_type="image/png", headers=headers)


@router.post("/{job_id}/cancel", responses=documented(404, 422))
def cancel_job(context: Lookalike, owner: Owner, job_id: Id) -> Cancellation:
    """Ask a job to stop; asking again is harmless."""
    with context.db.session() as session:
        outcome = store.request_cancel(session, owner, job_id)
        job = JobView.model_validate(store.get(session, owner, job_id))
        return Cancellation(outcome=outcome, job=job)


@router.get(
    "/{job_id}/events",
    response_model=events.EventPage,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "the job is finished and nothing is left to stream"},
        **documented(404, 422),
    },
)
async def job_events(
    request: Request,
    context: Lookalike,
    owner: Owner,
    job_id: Id,
    wanted: Annotated[EventRange, Query()],
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**62)] = None,
) -> Any:
    """What happened to a job: a page of events, or with `Accept: text/event-stream` all of them
    as they come, from `Last-Event-ID` (or `after`) on. A comment every 15 s keeps it alive."""
    after = wanted.after if last_event_id is None else last_event_id
    if "text/event-stream" in request.headers.get("accept", ""):
        return await events.stream(context, owner, job_id, after)
    return await run_in_threadpool(events.page, context, owner, job_id, after, wanted.limit)
