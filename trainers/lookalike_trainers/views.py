"""Which views of its photos a run learns from: shapes, cuts and captions. Torch-free.

A view is decided by the photo's content and the config alone, so it is encoded once for all runs
(datasets/features/latents.py).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lookalike_datasets.features.views import Cut, Photo
from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.prompts import class_prompt, instance_captions
from lookalike_trainers.run_request import RunImage, RunRequest
from lookalike_trainers.subjects import subjects_of

Shape = tuple[int, int]
"""Width and height in pixels."""

CLOSEST = 1.4
"""Crops show at least 1 / CLOSEST of a photo's width and height: the subject must stay in sight."""
FAR = 0.6
"""Photos reduced to less of the picture's sides are said to be far away or small."""
LEAST = 0.85
"""A bucket has at least this share of the pixels of a square of the run's resolution."""
LONGEST = 1.6
"""Times the resolution, a bucket's longer side at most: shapes go to about 5 : 2."""


class Shown(NamedTuple):
    """One view of a photo or a class image, what it is called, and the number of its subject."""

    photo: Photo
    cut: Cut
    caption: str
    subject: int = 0


def views_by_shape(
    request: RunRequest, config: TrainingConfig, multiple: int
) -> dict[Shape, list[list[Shown]]]:
    """The views of each photo, the photos by the shape at which they are learned.

    Args:
        multiple: sides are multiples of it, so that the denoiser can halve them.
    """
    assert config.resolution is not None
    square = (config.resolution, config.resolution)
    shapes = bucket_shapes(config.resolution, multiple) if config.aspect_buckets else [square]
    buckets: dict[Shape, list[list[Shown]]] = {}
    for number, subject in enumerate(subjects_of(request, config)):
        for image in subject.images:
            photo = Photo(image.path, image.sha256)
            shape = _nearest(photo, shapes) if config.aspect_buckets else square
            captions = instance_captions(image.caption, subject.config, subject.class_noun)
            views = [v for c in captions for v in photo_views(photo, c, shape, config)]
            buckets.setdefault(shape, []).append([v._replace(subject=number) for v in views])
    return dict(sorted(buckets.items()))


def photo_views(photo: Photo, caption: str, shape: Shape, config: TrainingConfig) -> list[Shown]:
    """The middle of a photo, or instead `sizes` of it, and `crops` other parts of it.

    With random_flip all of them mirrored too.
    """
    middle = Shown(photo, Cut(*shape, masked=config.masked_loss), caption)
    views = [_sized(middle, number) for number in range(config.sizes)] or [middle]
    for number in range(config.crops):
        luck = random.Random(f"{photo.sha256} crop {number}")
        zoom, x, y = luck.uniform(1, CLOSEST), luck.random(), luck.random()
        views.append(middle._replace(cut=replace(middle.cut, zoom=zoom, x=x, y=y)))
    if config.random_flip:
        views += [view._replace(cut=replace(view.cut, mirrored=True)) for view in views]
    return views


def _sized(middle: Shown, number: int) -> Shown:
    """The photo small on a canvas, or close, with a caption that says so (Kumari et al. 2023, 4).

    What of the canvas is not the photo is not learned.
    """
    luck = random.Random(f"{middle.photo.sha256} size {number}")
    zoom = luck.uniform(1 / 3, 1) if luck.random() < 2 / 3 else luck.uniform(1.2, 1.4)
    caption = middle.caption
    if zoom < FAR:
        caption = f"{luck.choice(('a far away', 'very small'))} {caption}"
    elif zoom > 1:
        caption = f"{luck.choice(('zoomed in', 'close up'))} {caption}"
    cut = replace(middle.cut, zoom=zoom, x=luck.random(), y=luck.random())
    return middle._replace(cut=cut, caption=caption)


def class_views(
    images: Sequence[RunImage], shape: Shape, config: TrainingConfig, class_noun: str
) -> list[list[Shown]]:
    """Class images cut to the shape of the photos beside which they are learned."""
    cuts = [Cut(*shape)]
    if config.random_flip:
        cuts.append(Cut(*shape, mirrored=True))
    prompt = class_prompt(config, class_noun)
    return [
        [Shown(Photo(image.path, image.sha256), cut, image.caption or prompt) for cut in cuts]
        for image in images
    ]


def bucket_shapes(resolution: int, multiple: int) -> list[Shape]:
    """The shapes that photos can have. Raises InvalidRequest if that is none but the square."""
    shapes = _shapes(resolution, multiple)
    if not any(width != height for width, height in shapes):
        larger = next(
            r for r in range(resolution, 64 * multiple, 8) if len(_shapes(r, multiple)) > 1
        )
        problem = FieldProblem(
            "config.aspect_buckets",
            f"pictures of this base have sides of multiples of {multiple} pixels, which leaves no "
            f"shape but the square at a resolution of {resolution}: leave it out, or set "
            f"resolution to {larger}",
        )
        raise InvalidRequest("The photos cannot keep their shapes.", [problem])
    return shapes


def side_multiple(base_folder: Path) -> int:
    """Pixels of a side per latent that the denoiser has halved as often as it does."""
    vae, unet = (
        len(json.loads((base_folder / part / "config.json").read_text())["block_out_channels"]) - 1
        for part in ("vae", "unet")
    )
    return int(2 ** (vae + unet))


def _shapes(resolution: int, multiple: int) -> list[Shape]:
    sides = range(multiple, int(resolution * LONGEST), multiple)
    pixels = resolution**2
    return [(w, h) for w in sides for h in sides if LEAST * pixels <= w * h <= pixels]


def _nearest(photo: Photo, shapes: Sequence[Shape]) -> Shape:
    """Of the shapes, the one whose sides have the photo's ratio most nearly."""
    ratio = photo.size[0] / photo.size[1]

    def distance(shape: Shape) -> float:
        return max(ratio * shape[1] / shape[0], shape[0] / shape[1] / ratio)

    return min(shapes, key=distance)
