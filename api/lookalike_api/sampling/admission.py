"""Admitting a generation: every name in it is looked up once and pinned. Torch-free."""

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from sqlalchemy.orm import Session

from lookalike_api.sampling.prompts import Subject, bind
from lookalike_api.sampling.requests import (
    MASK_STRENGTH,
    MAX_SEED,
    STRENGTH,
    GenerateJob,
    GenerationRequest,
    PinnedAdapter,
    PinnedImage,
)
from lookalike_api.sampling.sizes import size_of
from lookalike_datasets import images
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import AdapterVersion, UploadedImage
from lookalike_platform.errors import FieldProblem, InvalidRequest, NotFound
from lookalike_platform.samplers import WITH_ETA, check_sampler
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.compose import rules
from lookalike_registry.manifest import Manifest
from lookalike_registry.tensor_file import nth_word


def admit(
    session: Session, owner: str, settings: Settings, request: GenerationRequest
) -> tuple[GenerateJob, Base]:
    """The request with versions, base, size and seed decided, and warnings for its author.

    Raises:
        InvalidRequest: it cannot be carried out, with the path of each wrong field.
    """
    _check_fields(request, settings)
    found = []
    for number, use in enumerate(request.adapters):
        with _field(f"adapters[{number}].ref"):
            found.append(versions.resolve(session, owner, use.ref))
    manifests = [Manifest.model_validate(version.manifest) for version in found]
    _refuse_twice(manifests)
    _refuse_together(found, manifests)
    name = request.base or (manifests[0].base.name if manifests else settings.default_base)
    with _field("base"):
        base = bases.resolve(name, settings)
    _check_bases(base, found, manifests)
    schedule = json.loads((base.folder / "scheduler/scheduler_config.json").read_text())
    check_sampler(request.sampler, base_scheduler_config=schedule)
    picture = _image(session, owner, request.init_image, "init_image")
    mask = _image(session, owner, request.mask_image, "mask_image")
    width, height = size_of(request, base, picture, mask)

    subjects = [subjects_of(manifest) for manifest in manifests]
    groups = {m.identity.concept: own for m, own in zip(manifests, subjects, strict=True)}
    bound_prompt, warnings = bind(request.prompt, list(chain(*subjects)), groups)
    if request.guidance_scale == 1 and (idle := _idle(request)):
        warnings.append(f"At guidance scale 1 these have no effect: {', '.join(idle)}.")
    strength = request.strength
    if picture and strength is None:
        strength = MASK_STRENGTH if mask else STRENGTH
    seed = request.seed
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - request.num_images)
    job = GenerateJob(
        prompt=request.prompt,
        bound_prompt=bound_prompt,
        negative_prompt=request.negative_prompt,
        adapters=[
            PinnedAdapter(
                id=version.id,
                asked=use.ref,
                ref=f"{version.concept}@{version.version}",
                name=version.concept,
                version=version.version,
                digest=version.digest,
                scale=use.scale,
                word=version.id if manifest.weights.token_count else "",
            )
            for version, use, manifest in zip(found, request.adapters, manifests, strict=True)
        ],
        base=name,
        guidance_scale=request.guidance_scale,
        steps=request.steps,
        sampler=request.sampler,
        seed=seed,
        width=width,
        height=height,
        num_images=request.num_images,
        deterministic=request.deterministic,
        deadline_seconds=request.deadline_seconds,
        warnings=warnings,
        guidance_rescale=request.guidance_rescale,
        guidance_interval=(request.guidance_interval[0], request.guidance_interval[1]),
        dynamic_threshold=request.dynamic_threshold,
        eta=request.eta,
        init_image=_pinned(picture),
        strength=strength,
        mask_image=_pinned(mask),
    )
    return job, base


def subjects_of(manifest: Manifest) -> list[Subject]:
    """Whom a version can paint; of a merged one, each by its own name.

    Learned tokens get a word of the version's own: two owners may use the same trigger.
    """
    return [
        Subject(
            name=subject.name,
            trigger=subject.trigger,
            class_noun=subject.class_noun,
            word=nth_word(manifest.identity.id, place) if subject.learned else "",
            phrase=subject.phrase,
        )
        for place, subject in enumerate(manifest.subjects, 1)
    ]


def _check_fields(request: GenerationRequest, settings: Settings) -> None:
    limit = settings.max_prompt_characters
    problems = [
        FieldProblem(name, f"has {len(text)} characters; at most {limit} are read: shorten it")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt))
        if len(text) > limit
    ]
    if request.eta and request.sampler not in WITH_ETA:
        problems.append(
            FieldProblem("eta", f"{request.sampler} takes none; {' and '.join(WITH_ETA)} does")
        )
    for name in ("mask_image", "strength"):
        if getattr(request, name) is not None and request.init_image is None:
            problems.append(FieldProblem(name, "belongs to init_image, which is missing"))
    if request.strength is not None and int(request.steps * request.strength) < 1:
        message = f"of {request.steps} steps leaves none to make: raise it, or the steps"
        problems.append(FieldProblem("strength", f"{request.strength:g} {message}"))
    try:
        check_sampler(request.sampler)
    except InvalidRequest as error:
        problems += error.fields
    if problems:
        raise InvalidRequest("The pictures cannot be made as asked.", problems)


def _idle(request: GenerationRequest) -> list[str]:
    """What only matters with guidance, and is asked for."""
    names = ("negative_prompt", "guidance_rescale", "dynamic_threshold")
    return [name for name in names if getattr(request, name)]


def _image(session: Session, owner: str, id: str | None, field: str) -> UploadedImage | None:
    if id is None:
        return None
    with _field(field):
        return images.get(session, owner, id, lock=True)


def _pinned(image: UploadedImage | None) -> PinnedImage | None:
    return PinnedImage(id=image.id, sha256=image.sha256) if image else None


def _refuse_twice(manifests: list[Manifest]) -> None:
    names = Counter(name for manifest in manifests for name in manifest.names)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise InvalidRequest(
            "An adapter is listed more than once.",
            [FieldProblem("adapters", f"list {name} once, with one scale") for name in twice],
        )


def _refuse_together(found: list[AdapterVersion], manifests: list[Manifest]) -> None:
    """By the table of registry/compose/rules.py."""
    refs = [f"{version.concept}@{version.version}" for version in found]
    problems = [
        FieldProblem(f"adapters[{other}].ref", f"{refs[other]} cannot act with {refs[one]}: {why}")
        for one, other, why in rules.refusals([rules.kind_of(manifest) for manifest in manifests])
    ]
    if problems:
        raise InvalidRequest("These adapters cannot act in one generation.", problems)


def _check_bases(base: Base, found: list[AdapterVersion], manifests: list[Manifest]) -> None:
    problems = [
        FieldProblem(
            f"adapters[{number}].ref",
            f"{version.concept}@{version.version} was trained on the base model "
            f"{manifest.base.name} ({manifest.base.fingerprint[:12]}), and this request samples "
            f"{base.name} ({base.fingerprint[:12]}): use its own base, or train it on this one",
        )
        for number, (version, manifest) in enumerate(zip(found, manifests, strict=True))
        if version.base_fingerprint != base.fingerprint
    ]
    if problems:
        raise InvalidRequest("An adapter belongs to another base model.", problems)


@contextmanager
def _field(path: str) -> Iterator[None]:
    """A look-up that fails here is the fault of the request's field at `path`."""
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(error.detail, [FieldProblem(path, error.detail)]) from error
    except InvalidRequest as error:
        raise type(error)(error.detail, [FieldProblem(path, error.detail)]) from error
