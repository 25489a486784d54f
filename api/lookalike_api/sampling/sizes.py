"""What size the pictures of a generation have, and whether what is uploaded for it fits them."""

import json
from collections.abc import Sequence

from lookalike_api.sampling.requests import MAX_PIXELS, MAX_SIDE, GenerationRequest
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import UploadedImage
from lookalike_platform.errors import FieldProblem, InvalidRequest

MAX_CUT = 1 / 8
"""The share of a picture that may be cut off to fit it: more is hardly what its owner wants."""


def side_multiple(base: Base) -> int:
    """What width and height must be multiples of: the autoencoder halves a side
    log2(vae_scale) times, and the UNet once between each two of its blocks."""
    config = json.loads((base.folder / "unet/config.json").read_text())
    halvings = len(config["block_out_channels"]) - 1
    return base.vae_scale * 2**halvings


def size_of(
    request: GenerationRequest,
    base: Base,
    picture: UploadedImage | None,
    mask: UploadedImage | None,
    region_masks: Sequence[UploadedImage | None],
) -> tuple[int, int]:
    """Width and height in pixels.

    Raises InvalidRequest where the base cannot paint the size asked for, or where `picture` and
    `mask`, of which it starts, or the masks of regions have other proportions.
    """
    multiple = side_multiple(base)
    followed = _following(picture, base.resolution, multiple) if picture else None
    usual = followed or (base.resolution, base.resolution)
    width, height = request.width or usual[0], request.height or usual[1]
    problems = [
        FieldProblem(
            name,
            f"{side} is not a multiple of {multiple}, which {base.name} needs: "
            f"{_nearest(side, multiple)} would do",
        )
        for name, side in (("width", width), ("height", height))
        if side % multiple
    ]
    if width * height * request.num_images > MAX_PIXELS:
        problems.append(
            FieldProblem(
                "num_images",
                f"{request.num_images} pictures of {width} x {height} are more than "
                f"{MAX_PIXELS:,} pixels: ask for fewer or smaller ones",
            )
        )
    if picture and followed and _cut(picture, width, height) > MAX_CUT:
        problems.append(
            FieldProblem(
                "init_image",
                f"is {picture.width} x {picture.height} pixels, of which {width} x {height} would "
                f"cut off more than an eighth: crop it, or ask for {followed[0]} x {followed[1]}",
            )
        )
    if picture and mask and (mask.width, mask.height) != (picture.width, picture.height):
        problems.append(
            FieldProblem(
                "mask_image",
                f"is {mask.width} x {mask.height} pixels, and the picture it belongs to is "
                f"{picture.width} x {picture.height}: draw it over that one",
            )
        )
    problems += [
        FieldProblem(
            f"regions[{number}].mask_image",
            f"is {one.width} x {one.height} pixels, of which {width} x {height} would cut off more "
            "than an eighth: draw it in the proportions of the pictures",
        )
        for number, one in enumerate(region_masks)
        if one and _cut(one, width, height) > MAX_CUT
    ]
    if problems:
        raise InvalidRequest("The pictures cannot be made in this size.", problems)
    return width, height


def _following(picture: UploadedImage, resolution: int, multiple: int) -> tuple[int, int]:
    """The picture's proportions, with the base's resolution as the shorter side."""
    scale = resolution / min(picture.width, picture.height)
    longest = MAX_SIDE // multiple * multiple
    width, height = (
        min(_nearest(side * scale, multiple), longest) for side in (picture.width, picture.height)
    )
    return width, height


def _cut(picture: UploadedImage, width: int, height: int) -> float:
    """The share of the picture that lies outside of width x height laid over it."""
    scale = max(width / picture.width, height / picture.height)
    return 1 - width * height / (picture.width * picture.height * scale**2)


def _nearest(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
