"""A finished training, tried: put on the base again from its file, made to paint, judged. Torch.

The grid shows what it learned: one row a prompt, the base for the plain class noun at the left, the
adapter at the right, both from the same noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.request import SCENES, EvaluationOptions
from lookalike_trainers.evaluation.scores import figures, score
from lookalike_trainers.evaluation.trial import read_photos, try_on
from lookalike_trainers.painting import paint
from lookalike_trainers.run_request import RunRequest

OPTIONS = EvaluationOptions(prompts=list(SCENES), images_per_prompt=2, class_images=4, seed=11)
_TEXT_HEIGHT = 14


def try_out(
    request: RunRequest, config: TrainingConfig, adapter: Path, device: torch.device
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The grid, drawn as `samples.png` beside the adapter file, single images in `samples/`; and
    the adapter's figures (scores.py)."""
    assert config.resolution is not None
    parts = BaseParts(request.base_folder, device, request.cache)
    noun = request.class_noun
    scenes = [scene.format(subject=noun) for scene in OPTIONS.prompts]
    base = paint(parts, scenes, OPTIONS.seeds, config.resolution)
    called = config.phrase.format(trigger=config.trigger, class_noun=noun)
    painted = try_on(
        parts, request.method, adapter, config.trigger, called, noun, config.resolution, OPTIONS
    )
    judges = open_judges(parts, request.clip_encoder, request.dino_encoder)
    photos = read_photos([image.path for image in request.images])

    captions = [scene.format(subject=called) for scene in OPTIONS.prompts]
    _save_singles({"base": base, "adapter": painted.of_subject}, adapter.parent / "samples")
    path = adapter.parent / "samples.png"
    _grid(base, painted.of_subject, captions).save(path)
    return path, figures(score(judges, photos, painted))


Rows = Sequence[Sequence[Image.Image]]


def _save_singles(columns: dict[str, Rows], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for column, rows in columns.items():
        for row, pictures in enumerate(rows):
            for seed, picture in zip(OPTIONS.seeds, pictures, strict=True):
                picture.save(folder / f"{column}-{row}-{seed}.png")


def _grid(base: Rows, adapter: Rows, captions: list[str]) -> Image.Image:
    rows = [[*left, *right] for left, right in zip(base, adapter, strict=True)]
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(rows[0]), (side + _TEXT_HEIGHT) * len(rows)), "white")
    write = ImageDraw.Draw(sheet)
    for number, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top = number * (side + _TEXT_HEIGHT)
        write.text((2, top + 1), caption, fill="black")
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (place * side, top + _TEXT_HEIGHT))
    return sheet
