"""Where the regions of a generation lie, in latents. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageOps

from lookalike_platform.errors import FieldProblem, InvalidRequest

Cells = numpy.ndarray[Any, Any]
Box = Sequence[float]


def box_cells(box: Box, height: int, width: int) -> Cells:
    """The latents whose middle lies in a box of shares of the picture, true in [height, width]."""
    left, top, right, bottom = box
    x, y = ((numpy.arange(count) + 0.5) / count for count in (width, height))
    inside: Cells = ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))
    return inside


def mask_cells(path: Path, size: tuple[int, int], height: int, width: int) -> Cells:
    """The latents at least half of whose pixels are white in a mask brought to the pictures'
    size (width, height), true in [height, width]."""
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("L"), size, Image.Resampling.LANCZOS)
    white = numpy.asarray(fitted) >= 128
    shares = white.reshape(height, size[1] // height, width, size[0] // width).mean((1, 3))
    return shares >= 0.5


def numbered(regions: Sequence[Cells | None]) -> Cells:
    """The region of each latent, later ones over earlier ones: n + 1 for regions[n], 0 for none.

    Args:
        regions: latents they cover, true in [height, width]; None for one not known yet, which
            covers nothing.

    Raises InvalidRequest for a region that no latent is of.
    """
    known = {number: inside for number, inside in enumerate(regions, 1) if inside is not None}
    if not known:
        return numpy.zeros((0, 0), numpy.int64)
    cells = numpy.zeros(next(iter(known.values())).shape, numpy.int64)
    for number, inside in known.items():
        cells[inside] = number
    problems = [
        FieldProblem(
            f"regions[{number - 1}]",
            "is covered by later regions: put it after them, or make it larger"
            if inside.any()
            else "is smaller than a latent: make it larger, or ask for larger pictures",
        )
        for number, inside in known.items()
        if not (cells == number).any()
    ]
    if problems:
        places = "; ".join(f"{problem.path} {problem.message}" for problem in problems)
        raise InvalidRequest(f"A region has no place in the picture: {places}.", problems)
    return cells
