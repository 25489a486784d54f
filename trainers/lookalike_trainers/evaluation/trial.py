"""One adapter tried and judged, with its base in memory. Torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.request import EvaluationRequest
from lookalike_trainers.evaluation.scores import Paintings, figures, score
from lookalike_trainers.painting import paint, put_on


def evaluate(
    request: EvaluationRequest,
    parts: BaseParts,
    on_picture: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Paint what the request asks for, judge it, and give its figures (scores.py) as JSON.

    Args:
        on_picture: called with how many pictures of how many are painted; may raise to stop.
    """
    judges = open_judges(parts, request.clip_encoder, request.dino_encoder)
    options, noun = request.options, request.class_noun
    seeds = range(options.seed, options.seed + options.images_per_prompt)
    class_seeds = range(options.seed, options.seed + options.class_images)
    of_subject = len(options.prompts) * len(seeds)
    total = of_subject + len(class_seeds)

    take_off = put_on(parts, request.method, request.adapter, request.trigger)
    called = f"{request.trigger} {noun}"
    painted = Paintings(
        prompts=[prompt.format(subject=noun) for prompt in options.prompts],
        of_subject=paint(
            parts,
            [prompt.format(subject=called) for prompt in options.prompts],
            seeds,
            request.resolution,
            on_picture=lambda done: on_picture(done, total),
        ),
        of_class=paint(
            parts,
            [f"a {noun}"],
            class_seeds,
            request.resolution,
            on_picture=lambda done: on_picture(of_subject + done, total),
        )[0],
    )
    take_off()  # the base judges bare
    return figures(score(judges, read_photos(request.photos), painted))


def read_photos(paths: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]
