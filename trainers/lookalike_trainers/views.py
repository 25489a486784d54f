"""Which views of its photos a run learns from: shapes, cuts and captions. Torch-free.

A view is decided by the photo's content and the config alone, so it is encoded once for all runs
(datasets/features/latents.py).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from lookalike_datasets.features.views import Cut, Photo
from lookalike_trainers.config import RunRequest, TrainingConfig
from lookalike_trainers.prompts import class_prompt, instance_caption

Shape = tuple[int, int]
"""Width and height in pixels."""

CLOSEST = 1.4
"""Crops show at least 1 / CLOSEST of a photo's width and height: the subject must stay in sight."""
LONGEST = 2.0
"""A bucket's longer side over its shorter one, at most."""


class Shown(NamedTuple):
    """One view of a photo or a class image, and what it is called."""

    photo: Photo
    cut: Cut
    caption: str


def views_by_shape(
    request: RunRequest, config: TrainingConfig, multiple: int
) -> dict[Shape, list[list[Shown]]]:
    """The views of each photo, the photos by the shape at which they are learned.

    Args:
        multiple: sides are multiples of it, so that the denoiser can halve them.
    """
    assert config.resolution is not None
    buckets: dict[Shape, list[list[Shown]]] = {}
    for image in request.images:
        shape = (config.resolution, config.resolution)
        if config.aspect_buckets:
            shape = _nearest(Photo(image.path, image.sha256), config.resolution, multiple)
        caption = instance_caption(image.caption, config, request.class_noun)
        views = photo_views(Photo(image.path, image.sha256), caption, shape, config)
        buckets.setdefault(shape, []).append(views)
    return dict(sorted(buckets.items()))


def photo_views(photo: Photo, caption: str, shape: Shape, config: TrainingConfig) -> list[Shown]:
    """The middle of a photo and `crops` other parts of it; with random_flip, all mirrored too."""
    middle = Cut(*shape, masked=config.masked_loss)
    cuts = [middle]
    for number in range(config.crops):
        luck = random.Random(f"{photo.sha256} crop {number}")
        zoom, x, y = luck.uniform(1, CLOSEST), luck.random(), luck.random()
        cuts.append(replace(middle, zoom=zoom, x=x, y=y))
    if config.random_flip:
        cuts += [replace(cut, mirrored=True) for cut in cuts]
    return [Shown(photo, cut, caption) for cut in cuts]


def class_views(
    images: Sequence[Photo], shape: Shape, config: TrainingConfig, class_noun: str
) -> list[list[Shown]]:
    """Class images cut to the shape of the photos beside which they are learned."""
    cuts = [Cut(*shape)]
    if config.random_flip:
        cuts.append(Cut(*shape, mirrored=True))
    prompt = class_prompt(config, class_noun)
    return [[Shown(image, cut, prompt) for cut in cuts] for image in images]


def _nearest(photo: Photo, resolution: int, multiple: int) -> Shape:
    """Of the shapes, the one whose sides have the photo's ratio most nearly."""
    with Image.open(photo.path) as image:
        ratio = image.width / image.height

    def distance(shape: Shape) -> float:
        return max(ratio * shape[1] / shape[0], shape[0] / shape[1] / ratio)

    return min(_shapes(resolution, multiple), key=distance)


def _shapes(resolution: int, multiple: int) -> list[Shape]:
    """Shapes of at most resolution^2 pixels, their sides multiples, as high as they can be."""
    shapes = []
    for width in range(multiple, resolution**2 // multiple + 1, multiple):
        height = resolution**2 // width // multiple * multiple
        if height and max(width, height) <= LONGEST * min(width, height):
            shapes.append((width, height))
    return shapes
