"""What a training may ask for, and its admission as a job."""

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_api.http.problems import fields_of, wrong_values
from lookalike_api.http.shapes import Json
from lookalike_datasets import subject_sets
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import AdapterVersion, Job, SubjectSet
from lookalike_platform.errors import FieldProblem, NotFound, fault_of
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.jobs.store import NewJob
from lookalike_platform.settings import Settings
from lookalike_registry.manifest import NAME_PATTERN
from lookalike_trainers.catalog import METHODS, MethodInfo
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.cost import Cost, preview
from lookalike_trainers.defaults import defaults_on
from lookalike_trainers.method_configs import CustomDiffusionConfig
from lookalike_trainers.rare_tokens import rare_words
from lookalike_trainers.unused import unused_options


class JobRequest(BaseModel):
    """A training to run. `config` is the method's own: GET /v1/methods has its schema."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "method": "lora",
                    "subject_set": "set_01k9z3x8e4c5n6q7r8s9t0v1w2",
                    "base_model": "pocket-64",
                    "config": {"rank": 8, "steps": 300, "seed": 1},
                }
            ]
        },
    )

    method: str = Field(json_schema_extra={"enum": [method.name for method in METHODS]})
    subject_set: str = Field(pattern=r"^set_[0-9a-z]{1,40}$")
    base_model: str | None = Field(default=None, min_length=1, max_length=500)
    """Left out: the installation's default."""
    concept: str | None = Field(default=None, pattern=NAME_PATTERN)
    """What the adapter will be called. Left out: the subject set's name."""
    config: Json = Field(default={})

    @field_validator("config")
    @classmethod
    def _text(cls, config: Json) -> Json:
        try:
            json.dumps(config, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a character: write it as UTF-8") from None
        return config


def complete_config(
    session: Session, settings: Settings, owner: str, wanted: JobRequest
) -> TrainingConfig:
    """The method's config, taken by its word: "8" is no number and 1 no truth value.

    What it leaves out is as the base wants it (defaults.py). Where it has no trigger, it is the
    rarest word of the base's vocabulary that no other concept of this owner answers to, so that
    prompts and merges can tell them apart; if all of them are taken, the one that fewest answer to.

    Raises:
        InvalidRequest: no such method or base, wrong values, or some that the run would not read,
            with the path of each (`config.rank`).
    """
    config = _method(wanted.method).config
    base = _base(settings, wanted.base_model)
    given = defaults_on(base, config) | wanted.config
    if given.get("trigger") is None:
        given["trigger"] = _rare_word(base, _answered_to(session, owner, base, wanted))
    try:
        complete = config.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        raise wrong_values(fields_of(error.errors(), "config")) from error
    if unused := unused_options(complete):
        raise wrong_values(unused)
    return complete


def admit(
    session: Session, settings: Settings, owner: str, wanted: JobRequest, config: TrainingConfig
) -> tuple[NewJob, Cost]:
    """The job for a request, with its config complete and its base pinned, and what it costs.

    Raises:
        InvalidRequest: it cannot be carried out, with the path of each wrong field.
    """
    base = _base(settings, wanted.base_model)
    subject_set = _subject_set(session, owner, wanted.subject_set, "subject_set")
    if config.prior and config.prior.subject_set:
        _subject_set(session, owner, config.prior.subject_set, "config.prior.subject_set")
    also = config.also if isinstance(config, CustomDiffusionConfig) else ()
    others = [
        _subject_set(session, owner, set_id, f"config.also[{place}]")
        for place, set_id in enumerate(also)
    ]
    _check_sets(subject_set.id, config, also)
    nouns = [subject_set.class_noun, *(other.class_noun for other in others)]
    _check_prior(config, nouns)
    concept = wanted.concept or subject_set.name
    new = NewJob(
        owner=owner,
        kind="train",
        method=wanted.method,
        concept=concept,
        subject_set_id=subject_set.id,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        request={
            "method": wanted.method,
            "subject_set": subject_set.id,
            "base_model": base.name,
            "concept": concept,
            "config": config.model_dump(mode="json"),
        },
    )
    return new, preview(session, base, wanted.method, config, settings, nouns)


def _check_sets(own: str, config: TrainingConfig, also: Sequence[str]) -> None:
    """Photos are those of one subject, or of the class: a set has one of these parts."""
    problems = [
        FieldProblem(
            f"config.also[{place}]", "is a subject of this run already: name each set once"
        )
        for place, set_id in enumerate(also)
        if set_id in (own, *also[:place])
    ]
    if config.prior and config.prior.subject_set in (own, *also):
        message = "has the subject's own photos: name a set of others of its class, or leave it out"
        problems.append(FieldProblem("config.prior.subject_set", message))
    if problems:
        raise wrong_values(problems)


def _check_prior(config: TrainingConfig, nouns: list[str]) -> None:
    """A prior that is of one class must be that of every subject: nothing says whose it is."""
    classes = sorted({noun.casefold() for noun in nouns})
    if config.prior is None or len(classes) == 1:
        return
    message = (
        f"is of one class, and the subjects are of several ({', '.join(classes)}): leave it out, "
        "and the base draws images of each class; or train the subjects of one class together"
    )
    one_class = ("subject_set", "prompt")
    given = [name for name in one_class if getattr(config.prior, name)]
    if given:
        raise wrong_values([FieldProblem(f"config.prior.{name}", message) for name in given])


def _method(name: str) -> MethodInfo:
    for method in METHODS:
        if method.name == name:
            return method
    known = ", ".join(method.name for method in METHODS)
    message = f"there is no method {name!r}; choose one of {known}"
    raise wrong_values([FieldProblem("method", message)])


def _base(settings: Settings, name: str | None) -> Base:
    with fault_of("base_model"):
        return bases.resolve(name or settings.default_base, settings)


def _rare_word(base: Base, taken: list[str]) -> str:
    with fault_of("config.trigger"):
        return min(rare_words(base.folder), key=taken.count)


def _answered_to(session: Session, owner: str, base: Base, wanted: JobRequest) -> list[str]:
    """The triggers of the owner's other concepts on a base, those in training too."""
    concept = wanted.concept or _subject_set(session, owner, wanted.subject_set, "subject_set").name
    made = select(AdapterVersion.manifest["prompting"]["trigger"].as_string()).where(
        AdapterVersion.owner == owner,
        AdapterVersion.base_fingerprint == base.fingerprint,
        AdapterVersion.concept != concept,
        AdapterVersion.deleted_at.is_(None),
    )
    coming = select(Job.request["config"]["trigger"].as_string()).where(
        Job.owner == owner,
        Job.kind == "train",
        Job.base_fingerprint == base.fingerprint,
        Job.concept != concept,
        Job.state.not_in(TERMINAL),
    )
    return [*session.scalars(made), *session.scalars(coming)]


def _subject_set(session: Session, owner: str, set_id: str, field: str) -> SubjectSet:
    # Held until the job is there, so that a deletion waits, and then sees the job.
    held = select(SubjectSet.id).where(SubjectSet.id == set_id)
    session.execute(held.with_for_update(read=True, key_share=True))
    try:
        return subject_sets.get(session, owner, set_id)
    except NotFound as error:
        raise wrong_values([FieldProblem(field, error.detail)]) from error
