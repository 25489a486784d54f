"""An adapter's scores from what it painted. Torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from lookalike_trainers.evaluation import measures
from lookalike_trainers.evaluation.encoders import ImageEncoder, Judges


@dataclass(frozen=True)
class Paintings:
    """What an adapter painted.

    prompts: in plain words, "a dog in the snow", as judges are asked
    of_subject: of each prompt the pictures of the subject in that scene, one a seed
    of_class: pictures for the class noun alone, "a dog"
    class_noun: what all pictures are of
    """

    prompts: Sequence[str]
    of_subject: Sequence[Sequence[Image.Image]]
    of_class: Sequence[Image.Image]
    class_noun: str


class Scores(BaseModel):
    """The values whose means are the measures (measures.py); by encoder where several may judge.

    subject_fidelity: of each picture of the subject
    prompt_fidelity: the same; cosines if CLIP judged, else probabilities
    prior_drift: PRES, of each picture of the class
    subject_diversity: DIV of the pictures of each prompt
    class_diversity: DIV of the pictures of the class, a single value
    real_resemblance: of each real photo to the others: what subject fidelity can be at best
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject_fidelity: dict[str, list[float]]
    prompt_fidelity: dict[str, list[float]]
    prior_drift: dict[str, list[float]]
    subject_diversity: dict[str, list[float]]
    class_diversity: dict[str, list[float]]
    real_resemblance: dict[str, list[float]]


def score(judges: Judges, real: Sequence[Image.Image], painted: Paintings) -> Scores:
    """Judge an adapter's pictures.

    Diversity is left out where there are fewer than two pictures to compare.

    Args:
        real: the photos it learned from.
    """
    pictures = [picture for of_prompt in painted.of_subject for picture in of_prompt]
    asked = [
        prompt
        for prompt, of_prompt in zip(painted.prompts, painted.of_subject, strict=True)
        for _ in of_prompt
    ]
    by_encoder: dict[str, dict[str, list[float]]] = {
        name: {} for name in Scores.model_fields if name != "prompt_fidelity"
    }
    for encoder in judges.subject:
        for name, values in _of_encoder(encoder, real, painted).items():
            by_encoder[name][encoder.name] = values
    probable = judges.prompt.score_prompts(pictures, asked, painted.class_noun).tolist()
    return Scores(prompt_fidelity={judges.prompt.name: probable}, **by_encoder)


def figures(scores: Scores) -> dict[str, dict[str, Any]]:
    """By measure and judge the mean of an adapter's scores: {"mean", "low", "high", "count"}.

    The interval is over this adapter's pictures, and says nothing about other subjects.
    """
    return {
        measure: {
            judge: asdict(measures.bootstrap(values))
            for judge, values in by_judge.items()
            if values
        }
        for measure, by_judge in scores.model_dump().items()
    }


def record(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a version's manifest keeps of figures: each mean, by the judge to go by."""
    means = {
        measure: next(iter(by_judge.values()))["mean"]
        for measure, by_judge in figures.items()
        if by_judge and measure != "real_resemblance"
    }
    return {
        **means,
        "subject_judge": next(iter(figures["subject_fidelity"])),
        "prompt_judge": next(iter(figures["prompt_fidelity"])),
    }


def _of_encoder(
    encoder: ImageEncoder, real: Sequence[Image.Image], painted: Paintings
) -> dict[str, list[float]]:
    photos = encoder.encode_images(real)
    of_subject = [encoder.encode_images(pictures) for pictures in painted.of_subject]
    of_class = encoder.encode_images(painted.of_class)
    return {
        "subject_fidelity": measures.subject_fidelity(torch.cat(of_subject), photos).tolist(),
        "prior_drift": measures.prior_drift(of_class, photos).tolist(),
        "subject_diversity": [measures.diversity(p) for p in of_subject if len(p) > 1],
        "class_diversity": [measures.diversity(of_class)] if len(of_class) > 1 else [],
        "real_resemblance": measures.resemblance(photos).tolist() if len(photos) > 1 else [],
    }
