"""One adapter tried on its base in memory, and judged. Torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.request import EvaluationOptions, EvaluationRequest
from lookalike_trainers.evaluation.scores import Paintings, figures, score
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.painting import paint

OnPicture = Callable[[int, int], object]
"""Called with how many pictures of how many are painted; may raise to stop."""


def evaluate(
    request: EvaluationRequest, parts: BaseParts, on_picture: OnPicture = lambda done, total: None
) -> dict[str, Any]:
    """Paint what the request asks for, judge it, and give its figures (scores.py) as JSON."""
    judges = open_judges(parts, request.clip_encoder, request.dino_encoder)
    painted = try_on(
        parts,
        request.method,
        request.adapter,
        request.trigger,
        request.called,
        request.class_noun,
        request.resolution,
        request.options,
        on_picture,
    )
    return figures(score(judges, read_photos(request.photos), painted))


def try_on(
    parts: BaseParts,
    method: str,
    adapter: Path,
    trigger: str,
    called: str,
    class_noun: str,
    resolution: int,
    options: EvaluationOptions,
    on_picture: OnPicture = lambda done, total: None,
) -> Paintings:
    """What an adapter paints. It is taken off afterwards: the base judges bare.

    Args:
        trigger: the word that stands for learned tokens.
        called: how prompts speak of the subject, "sks dog".
    """
    of_subject = len(options.prompts) * options.images_per_prompt
    total = of_subject + options.class_images
    take_off = wear_of(method)(parts, adapter, 1.0, trigger)
    painted = Paintings(
        prompts=[prompt.format(subject=class_noun) for prompt in options.prompts],
        of_subject=paint(
            parts,
            [prompt.format(subject=called) for prompt in options.prompts],
            options.seeds,
            resolution,
            on_picture=lambda done: on_picture(done, total),
        ),
        of_class=paint(
            parts,
            [f"a {class_noun}"],
            options.class_seeds,
            resolution,
            on_picture=lambda done: on_picture(of_subject + done, total),
        )[0],
        class_noun=class_noun,
    )
    take_off()
    return painted


def read_photos(paths: Sequence[Path]) -> list[Image.Image]:
    """Photos, upright."""
    photos = []
    for path in paths:
        with Image.open(path) as photo:
            photos.append(ImageOps.exif_transpose(photo).convert("RGB"))
    return photos
