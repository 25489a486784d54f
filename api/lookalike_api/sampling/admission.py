"""Admitting a generation: every name in it is looked up once and pinned. Torch-free."""

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from lookalike_api.sampling.prompts import Subject, bind
from lookalike_api.sampling.requests import (
    MAX_PIXELS,
    MAX_SEED,
    GenerateJob,
    GenerationRequest,
    PinnedAdapter,
)
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import FieldProblem, InvalidRequest, NotFound
from lookalike_platform.samplers import SAMPLERS
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.manifest import Manifest


def admit(
    session: Session, owner: str, settings: Settings, request: GenerationRequest
) -> tuple[GenerateJob, Base]:
    """The request with versions, base, size and seed decided, and warnings for its author.

    Raises:
        InvalidRequest: it cannot be carried out, with the path of each wrong field.
    """
    _check_words(request, settings)
    found = []
    for number, use in enumerate(request.adapters):
        with _field(f"adapters[{number}].ref"):
            found.append(versions.resolve(session, owner, use.ref))
    _refuse_twice(found)
    manifests = [Manifest.model_validate(version.manifest) for version in found]
    name = request.base or (manifests[0].base.name if manifests else settings.default_base)
    with _field("base"):
        base = bases.resolve(name, settings)
    _check_bases(base, found, manifests)
    width, height = _size(request, base)

    subjects = [_subject(manifest) for manifest in manifests]
    bound_prompt, warnings = bind(request.prompt, subjects)
    if request.negative_prompt and request.guidance_scale == 1:
        warnings.append("The negative prompt has no effect at guidance scale 1.")
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
                word=subject.word,
            )
            for version, use, subject in zip(found, request.adapters, subjects, strict=True)
        ],
        base=name,
        guidance_scale=request.guidance_scale,
        steps=request.steps,
        sampler=request.sampler,
        seed=seed,
        width=width,
        height=height,
        num_images=request.num_images,
        warnings=warnings,
    )
    return job, base


def _subject(manifest: Manifest) -> Subject:
    """Learned tokens get a word of the version's own: two owners may use the same trigger."""
    prompting = manifest.prompting
    return Subject(
        name=manifest.identity.concept,
        trigger=prompting.trigger,
        class_noun=prompting.class_noun,
        word=manifest.identity.id if manifest.weights.token_count else "",
        phrase=prompting.phrase,
    )


def side_multiple(base: Base) -> int:
    """What width and height must be multiples of: the autoencoder halves a side
    log2(vae_scale) times, and the UNet once between each two of its blocks."""
    config = json.loads((base.folder / "unet/config.json").read_text())
    halvings = len(config["block_out_channels"]) - 1
    return base.vae_scale * 2**halvings


def _check_words(request: GenerationRequest, settings: Settings) -> None:
    limit = settings.max_prompt_characters
    problems = [
        FieldProblem(name, f"has {len(text)} characters; at most {limit} are read: shorten it")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt))
        if len(text) > limit
    ]
    if request.sampler not in SAMPLERS:
        choices = ", ".join(SAMPLERS)
        problems.append(
            FieldProblem("sampler", f"there is no {request.sampler!r}; choose one of {choices}")
        )
    if problems:
        raise InvalidRequest("The pictures cannot be made as asked.", problems)


def _refuse_twice(found: list[AdapterVersion]) -> None:
    names = Counter(version.concept for version in found)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise InvalidRequest(
            "An adapter is listed more than once.",
            [FieldProblem("adapters", f"list {name} once, with one scale") for name in twice],
        )


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


def _size(request: GenerationRequest, base: Base) -> tuple[int, int]:
    multiple = side_multiple(base)
    sides = {
        "width": request.width or base.resolution,
        "height": request.height or base.resolution,
    }
    problems = [
        FieldProblem(
            name,
            f"{side} is not a multiple of {multiple}, which {base.name} needs: "
            f"{max(multiple, round(side / multiple) * multiple)} would do",
        )
        for name, side in sides.items()
        if side % multiple
    ]
    width, height = sides["width"], sides["height"]
    if width * height * request.num_images > MAX_PIXELS:
        problems.append(
            FieldProblem(
                "num_images",
                f"{request.num_images} pictures of {width} x {height} are more than "
                f"{MAX_PIXELS:,} pixels: ask for fewer or smaller ones",
            )
        )
    if problems:
        raise InvalidRequest("The pictures cannot be made in this size.", problems)
    return width, height


@contextmanager
def _field(path: str) -> Iterator[None]:
    """A look-up that fails here is the fault of the request's field at `path`."""
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(error.detail, [FieldProblem(path, error.detail)]) from error
    except InvalidRequest as error:
        raise type(error)(error.detail, [FieldProblem(path, error.detail)]) from error
