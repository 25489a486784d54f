"""Admitting a generation: every name in it is looked up once and pinned. Torch-free."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from lookalike_api.sampling.cast import Cast, look_up
from lookalike_api.sampling.regions import box_cells, numbered
from lookalike_api.sampling.requests import (
    MASK_STRENGTH,
    MAX_SEED,
    STRENGTH,
    GenerateJob,
    GenerationRequest,
    PinnedImage,
    PinnedRegion,
)
from lookalike_api.sampling.sizes import size_of
from lookalike_datasets import images
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import UploadedImage
from lookalike_platform.errors import FieldProblem, InvalidRequest, fault_of
from lookalike_platform.samplers import WITH_ETA, check_sampler, check_steps, scheduler_of
from lookalike_platform.settings import Settings
from lookalike_platform.steps import answers_of, guided_answers, steps_made


def admit(
    session: Session, owner: str, settings: Settings, request: GenerationRequest
) -> tuple[GenerateJob, Base]:
    """The request with versions, base, size and seed decided, and warnings for its author.

    Raises:
        InvalidRequest: it cannot be carried out, with the path of each wrong field.
    """
    _check_fields(request, settings)
    cast = look_up(session, owner, request.adapters)
    regional = [
        look_up(session, owner, region.adapters, f"regions[{number}].")
        for number, region in enumerate(request.regions)
    ]
    manifests = [manifest for one in (cast, *regional) for manifest in one.manifests]
    name = request.base or (manifests[0].base.name if manifests else settings.default_base)
    with fault_of("base"):
        base = bases.resolve(name, settings)
    _check_casts(request, base, [cast, *regional])
    schedule = json.loads((base.folder / "scheduler/scheduler_config.json").read_text())
    check_sampler(request.sampler, base_scheduler_config=schedule)
    from_noise = request.init_image is None
    check_steps(request.sampler, schedule, request.steps, from_noise=from_noise)
    _check_guided(request, *scheduler_of(request.sampler, schedule))
    picture = _image(session, owner, request.init_image, "init_image")
    mask = _image(session, owner, request.mask_image, "mask_image")
    masks = [
        _image(session, owner, region.mask_image, f"regions[{number}].mask_image")
        for number, region in enumerate(request.regions)
    ]
    width, height = size_of(request, base, picture, mask, masks)
    _check_places(request, height // base.vae_scale, width // base.vae_scale)

    bound_prompt, warnings = cast.bind(request.prompt)
    regions = []
    for one, region, its_mask in zip(regional, request.regions, masks, strict=True):
        bound, its_warnings = one.bind(region.prompt)
        warnings += its_warnings
        regions.append(
            PinnedRegion(
                prompt=region.prompt,
                bound_prompt=bound,
                bound_negative=one.bind_negative(request.negative_prompt, [cast, *regional]),
                adapters=one.pinned(),
                box=region.sides,
                mask_image=_pinned(its_mask),
            )
        )
    if request.guidance_scale == 1 and (idle := _idle(request)):
        warnings.append(f"At guidance scale 1 these have no effect: {', '.join(idle)}.")
    seed = request.seed
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - request.num_images)
    job = GenerateJob(
        prompt=request.prompt,
        bound_prompt=bound_prompt,
        negative_prompt=request.negative_prompt,
        bound_negative=cast.bind_negative(request.negative_prompt, regional),
        adapters=cast.pinned(),
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
        strength=_strength(request),
        mask_image=_pinned(mask),
        regions=regions,
        compose=request.compose,
    )
    return job, base


def _check_fields(request: GenerationRequest, settings: Settings) -> None:
    limit = settings.max_prompt_characters
    problems = [
        FieldProblem(name, f"has {len(text)} characters; at most {limit} are read: shorten it")
        for name, text in (
            ("prompt", request.prompt),
            ("negative_prompt", request.negative_prompt),
            *((f"regions[{n}].prompt", region.prompt) for n, region in enumerate(request.regions)),
        )
        if len(text) > limit
    ]
    if request.eta and request.sampler not in WITH_ETA:
        problems.append(
            FieldProblem("eta", f"{request.sampler} takes none; {' and '.join(WITH_ETA)} does")
        )
    last = MAX_SEED - request.num_images + 1
    if request.seed is not None and request.seed > last:
        message = f"leaves no seeds for {request.num_images} pictures: give {last} or less"
        problems.append(FieldProblem("seed", message))
    for name in ("mask_image", "strength"):
        if getattr(request, name) is not None and request.init_image is None:
            problems.append(FieldProblem(name, "belongs to init_image, which is missing"))
    if request.compose != "attention" and not request.regions:
        problems.append(FieldProblem("compose", "belongs to regions, which are missing"))
    strength = _strength(request)
    if strength is not None and steps_made(request.steps, strength) < 1:
        message = f"of the steps ({request.steps}) leaves none to make: raise it, or the steps"
        problems.append(FieldProblem("strength", f"{strength:g} {message}"))
    try:
        check_sampler(request.sampler)
    except InvalidRequest as error:
        problems += error.fields
    if problems:
        raise InvalidRequest("The pictures cannot be made as asked.", problems)


def _check_casts(request: GenerationRequest, base: Base, casts: Sequence[Cast]) -> None:
    problems = [problem for cast in casts for problem in cast.other_bases(base)]
    if problems:
        raise InvalidRequest("An adapter belongs to another base model.", problems)
    if request.regions and request.compose == "attention":
        problems = [problem for cast in casts for problem in cast.whole()]
    if problems:
        raise InvalidRequest("An adapter cannot be kept to a region of the attention.", problems)


def _check_guided(request: GenerationRequest, scheduler: str, config: dict[str, Any]) -> None:
    """Guidance that is asked for must act in some step that is made."""
    if request.guidance_scale == 1:
        return
    begin, end = request.guidance_interval
    strength = _strength(request)
    made = request.steps if strength is None else steps_made(request.steps, strength)
    whole = answers_of(scheduler, config, request.steps)
    skipped = whole - answers_of(scheduler, config, made)
    if not any(answer >= skipped for answer in guided_answers((begin, end), whole)):
        message = f"[{begin:g}, {end:g}] has none of the steps that are made: widen it"
        problem = FieldProblem("guidance_interval", message)
        raise InvalidRequest("Guidance is asked for, and no step would be guided.", [problem])


def _check_places(request: GenerationRequest, height: int, width: int) -> None:
    """In latents. What masks leave to other regions shows only when they are painted."""
    if request.regions:
        boxes = [region.box for region in request.regions]
        numbered([box_cells(box, height, width) if box else None for box in boxes])


def _strength(request: GenerationRequest) -> float | None:
    """Also where a picture to start from comes without one."""
    if request.strength is not None or request.init_image is None:
        return request.strength
    return STRENGTH if request.mask_image is None else MASK_STRENGTH


def _idle(request: GenerationRequest) -> list[str]:
    """What only matters with guidance, and is asked for."""
    names = ("negative_prompt", "guidance_rescale", "dynamic_threshold")
    return [name for name in names if getattr(request, name)]


def _image(session: Session, owner: str, id: str | None, path: str) -> UploadedImage | None:
    if id is None:
        return None
    with fault_of(path):
        return images.get(session, owner, id, lock=True)


def _pinned(image: UploadedImage | None) -> PinnedImage | None:
    return PinnedImage(id=image.id, sha256=image.sha256) if image else None
