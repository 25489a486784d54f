"""Generations: pictures made with adapters, as queued jobs whose result can be waited for."""

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from lookalike_api.http import submission
from lookalike_api.http.context import Context, Id, IdempotencyKey, Lookalike, Owner
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Json, Moment, Parameters
from lookalike_api.sampling.admission import admit
from lookalike_api.sampling.limits import check_room
from lookalike_api.sampling.requests import Compose, GenerateJob, GenerationRequest, PinnedImage
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from lookalike_platform.jobs import store
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.jobs.store import NewJob

router = APIRouter(prefix="/v1/generations", tags=["generations"])

LOOK_SECONDS = 0.05


class VersionUsed(BaseModel):
    """What a reference meant when the request was accepted. `digest`: sha256 of the weights."""

    asked: str
    ref: str
    name: str
    version: int
    digest: str
    scale: float


class ImageMade(BaseModel):
    """One picture: its path here, and the seed that makes it again alone."""

    seed: int
    url: str
    sha256: str


class RegionView(BaseModel):
    """A region, with what its references meant."""

    prompt: str
    bound_prompt: str
    versions: list[VersionUsed]
    box: tuple[float, float, float, float] | None
    mask_image: PinnedImage | None


class GenerationView(BaseModel):
    """Pictures asked for. `images` fills when `state` is `succeeded`; `error` is the problem of a
    failed one; `bound_prompt` is what the text encoder reads."""

    id: str
    state: Literal["queued", "preparing", "sampling", "succeeded", "failed", "canceled"]
    prompt: str
    bound_prompt: str
    negative_prompt: str
    versions: list[VersionUsed]
    base: str
    base_fingerprint: str
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    dynamic_threshold: float | None
    steps: int
    sampler: str
    eta: float
    seed: int
    width: int
    height: int
    num_images: int
    deterministic: bool
    deadline_seconds: float | None
    init_image: PinnedImage | None
    strength: float | None
    mask_image: PinnedImage | None
    regions: list[RegionView]
    compose: Compose
    warnings: list[str]
    progress: Json
    images: list[ImageMade]
    seconds: float | None
    error: Json | None
    created_at: Moment
    finished_at: Moment | None


class Wait(Parameters):
    wait: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="seconds to wait for the pictures"
    )


@router.post(
    "",
    status_code=202,
    response_model=GenerationView,
    responses={
        200: {"model": GenerationView, "description": "finished within `wait`"},
        **documented(413, 422, 429),
    },
)
async def generate(
    request: Request,
    context: Lookalike,
    owner: Owner,
    wanted: GenerationRequest,
    query: Annotated[Wait, Query()],
    key: IdempotencyKey = None,
) -> Response:
    """Queue pictures; with `wait` answer when they are finished, or when the time is up."""
    if query.wait > (longest := context.settings.max_wait_seconds):
        message = f"at most {longest:g} seconds; then follow the job's events"
        raise InvalidRequest("The wait is too long.", [FieldProblem("wait", message)])

    def queue(session: Session) -> Json:
        job, base = admit(session, owner, context.settings, wanted)
        check_room(session, owner, context.settings)
        new = NewJob(
            owner=owner,
            kind="generate",
            base_model=base.name,
            base_fingerprint=base.fingerprint,
            request=job.model_dump(mode="json"),
        )
        return view(store.submit(session, new)).model_dump(mode="json")

    asked = {"generation": wanted.model_dump(mode="json")}
    answer = await run_in_threadpool(submission.submit, context, owner, key, asked, queue)
    if context.caller and not answer.replayed:
        # Not waited for: a sampler that is away must cost the client nothing.
        context.caller.call()
    if query.wait:
        id = answer.body["id"]
        job = await _finished(request, context, owner, id, time.monotonic() + query.wait)
        status = 200 if job.state in TERMINAL else 202
        answer = replace(answer, status=status, body=view(job).model_dump(mode="json"))
    return submission.respond(answer, router.prefix)


@router.get("/{generation_id}", responses=documented(404, 422))
def get_generation(context: Lookalike, owner: Owner, generation_id: Id) -> GenerationView:
    with context.db.read_session() as session:
        return view(_get(session, owner, generation_id))


@router.get(
    "/{generation_id}/images/{index}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 409, 422)},
)
def get_image(context: Lookalike, owner: Owner, generation_id: Id, index: int) -> Response:
    """A picture. Its `parameters` text chunk is JSON that makes it again."""
    with context.db.read_session() as session:
        job = _get(session, owner, generation_id)
    if job.result is None:
        raise Conflict(f"{generation_id} is {job.state}: it has no pictures.")
    images = job.result["images"]
    if not 0 <= index < len(images):
        raise NotFound(f"{generation_id} has pictures 0 to {len(images) - 1}.")
    digest = images[index]["sha256"]
    headers = {
        "ETag": f'"{digest}"',
        "Content-Disposition": f'inline; filename="{generation_id}-{index}.png"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return Response(context.blobs.get(digest), media_type="image/png", headers=headers)


def view(job: Job) -> GenerationView:
    asked = GenerateJob.model_validate(job.request)
    made: Json = job.result or {"images": [], "warnings": [], "seconds": None}
    return GenerationView.model_validate(
        {
            **asked.model_dump(exclude={"adapters", "regions"}),
            "regions": [
                {
                    **region.model_dump(exclude={"adapters"}),
                    "versions": [adapter.model_dump() for adapter in region.adapters],
                }
                for region in asked.regions
            ],
            "id": job.id,
            "state": job.state,
            "versions": [adapter.model_dump() for adapter in asked.adapters],
            "base_fingerprint": job.base_fingerprint,
            "warnings": [*asked.warnings, *made["warnings"]],
            "progress": job.progress,
            "images": [
                {
                    "seed": image["seed"],
                    "sha256": image["sha256"],
                    "url": f"{router.prefix}/{job.id}/images/{index}",
                }
                for index, image in enumerate(made["images"])
            ],
            "seconds": made["seconds"],
            "error": job.error,
            "created_at": job.created_at,
            "finished_at": job.finished_at,
        }
    )


def _get(session: Session, owner: str, generation_id: str) -> Job:
    job = store.get(session, owner, generation_id)
    if job.kind != "generate":
        raise NotFound(f"{generation_id} makes no pictures; see /v1/jobs/{generation_id}.")
    return job


async def _finished(
    request: Request, context: Context, owner: str, id: str, deadline: float
) -> Job:
    """The job at its end, or as it is when time is up, the client gone or the server stopping."""

    def look() -> Job:
        with context.db.read_session() as session:
            return store.get(session, owner, id)

    while True:
        job: Any = await run_in_threadpool(look)
        left = deadline - time.monotonic()
        given_up = left <= 0 or context.stopping() or await request.is_disconnected()
        if job.state in TERMINAL or given_up:
            return job
        await asyncio.sleep(min(LOOK_SECONDS, left))
