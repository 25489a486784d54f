"""Evaluations: how good an adapter version is, as queued jobs that leave figures."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from lookalike_api.http import submission
from lookalike_api.http.context import Id, IdempotencyKey, Lookalike, Owner
from lookalike_api.http.problems import documented, wrong_values
from lookalike_api.http.shapes import Json, Moment
from lookalike_datasets import subject_sets
from lookalike_platform import bases
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import FieldProblem, NotFound, fault_of
from lookalike_platform.jobs import store
from lookalike_platform.jobs.store import NewJob
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.manifest import Manifest
from lookalike_trainers.evaluation.request import EvaluateJob, EvaluationOptions, Pinned

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])


class EvaluationWanted(EvaluationOptions):
    """An adapter version to judge: `rex@3`, `rex@candidate` or `rex`.

    `subject_set`: real photos of the subject. Left out: those the adapter learned from.
    """

    adapter: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*(@[\w.-]+)?$", max_length=200, examples=["rex@candidate"]
    )
    subject_set: str | None = Field(default=None, pattern=r"^set_[0-9a-z]{1,40}$")


class Figure(BaseModel):
    """A mean over `count` pictures (or prompts) and its 95% interval; a single value has none."""

    mean: float
    low: float | None
    high: float | None
    count: int


class EvaluationView(BaseModel):
    """An evaluation. `figures` fills when `state` is `succeeded`: by measure, then by judge.

    `real_resemblance` is what the real photos reach among themselves; `error` the problem of a
    failed evaluation.
    """

    id: str
    state: Literal["queued", "preparing", "evaluating", "succeeded", "failed", "canceled"]
    adapter: str
    digest: str
    subject_set: str | None
    options: EvaluationOptions
    progress: Json
    figures: dict[str, dict[str, Figure]] | None
    seconds: float | None
    error: Json | None
    created_at: Moment
    finished_at: Moment | None


@router.post("", status_code=202, response_model=EvaluationView, responses=documented(413, 422))
def evaluate(
    context: Lookalike, owner: Owner, wanted: EvaluationWanted, key: IdempotencyKey = None
) -> Response:
    """Queue an evaluation: it paints with the adapter, and judges what came out."""

    def queue(session: Session) -> Json:
        new = _admit(session, owner, context.settings, wanted)
        return _view(store.submit(session, new)).model_dump(mode="json")

    asked = {"evaluation": wanted.model_dump(mode="json")}
    answer = submission.submit(context, owner, key, asked, queue)
    return submission.respond(answer, router.prefix)


@router.get("/{evaluation_id}", responses=documented(404, 422))
def get_evaluation(context: Lookalike, owner: Owner, evaluation_id: Id) -> EvaluationView:
    with context.db.read_session() as session:
        job = store.get(session, owner, evaluation_id)
    if job.kind != "evaluate":
        raise NotFound(f"{evaluation_id} evaluates nothing; see /v1/jobs/{evaluation_id}.")
    return _view(job)


def _admit(session: Session, owner: str, settings: Settings, wanted: EvaluationWanted) -> NewJob:
    """The job for a request, with its version pinned.

    Raises InvalidRequest if it cannot be carried out, with the path of the wrong field.
    """
    try:
        version = versions.resolve(session, owner, wanted.adapter, lock=True)
    except NotFound as error:
        raise wrong_values([FieldProblem("adapter", error.detail)]) from error
    manifest = Manifest.model_validate(version.manifest)
    with fault_of("adapter"):
        base = bases.resolve(manifest.base.name, settings)
    if base.fingerprint != version.base_fingerprint:
        message = f"was trained on another base model than the {base.name} that is here"
        raise wrong_values([FieldProblem("adapter", message)])
    set_id = wanted.subject_set or manifest.lineage.subject_set
    if not set_id:  # merged, or imported
        message = f"is missing: {version.ref} learned from no photos of its own. Name those of "
        problem = FieldProblem("subject_set", f"{message}{manifest.subjects[0].name}")
        raise wrong_values([problem])
    try:
        subject_sets.get(session, owner, set_id)
    except NotFound as error:
        message = f"{error.detail} Upload photos of the subject, and name them here."
        raise wrong_values([FieldProblem("subject_set", message)]) from error

    prompting = manifest.prompting
    resolution = manifest.lineage.config.get("resolution")
    job = EvaluateJob(
        adapters=[Pinned(id=version.id, ref=version.ref, digest=version.digest)],
        method=version.method,
        trigger=prompting.trigger,
        called=prompting.phrase.format(trigger=prompting.trigger, class_noun=prompting.class_noun),
        class_noun=prompting.class_noun,
        resolution=resolution if isinstance(resolution, int) else base.resolution,
        options=EvaluationOptions.model_validate(
            wanted.model_dump(include=set(EvaluationOptions.model_fields))
        ),
    )
    return NewJob(
        owner=owner,
        kind="evaluate",
        method=version.method,
        concept=version.concept,
        subject_set_id=set_id,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        request=job.model_dump(mode="json"),
    )


def _view(job: Job) -> EvaluationView:
    asked = EvaluateJob.model_validate(job.request)
    [adapter] = asked.adapters
    made: Json = job.result or {"figures": None, "seconds": None}
    return EvaluationView.model_validate(
        {
            "id": job.id,
            "state": job.state,
            "adapter": adapter.ref,
            "digest": adapter.digest,
            "subject_set": job.subject_set_id,
            "options": asked.options,
            "progress": job.progress,
            **made,
            "error": job.error,
            "created_at": job.created_at,
            "finished_at": job.finished_at,
        }
    )
