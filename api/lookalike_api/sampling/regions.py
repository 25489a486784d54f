"""Where the regions of a generation lie, in latents. Torch-free."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lookalike_api.sampling.fitting import fitted
from lookalike_platform.errors import FieldProblem, InvalidRequest

Box = Sequence[float]
Cells = list[bytes]
"""A number for each latent, row by row from the top: [height][width]."""


def box_cells(box: Box, height: int, width: int) -> Cells:
    """1 for the latents whose middle lies in a box of shares of the picture, 0 for others."""
    left, top, right, bottom = box
    across = bytes(left <= (x + 0.5) / width < right for x in range(width))
    return [across if top <= (y + 0.5) / height < bottom else bytes(width) for y in range(height)]


def mask_cells(path: Path, size: tuple[int, int], height: int, width: int) -> Cells:
    """1 for the latents at least half of whose pixels are white in a mask brought to the pictures'
    size (width, height), 0 for others."""
    white = fitted(path, "L", size).point([0] * 128 + [255] * 128)
    shares = white.resize((width, height), Image.Resampling.BOX).tobytes()
    return [bytes(x >= 128 for x in shares[y * width :][:width]) for y in range(height)]


def numbered(regions: Sequence[Cells | None]) -> Cells:
    """The region of each latent, later ones over earlier ones: n + 1 for regions[n], 0 for none.

    Args:
        regions: 1 for the latents that each covers; None for one not known yet, which covers
            nothing.

    Raises InvalidRequest for a region that no latent is of.
    """
    known = {number: inside for number, inside in enumerate(regions, 1) if inside is not None}
    cells = [bytes(len(row)) for row in next(iter(known.values()), [])]
    for number, inside in known.items():
        cells = [
            bytes(number if mine else before for mine, before in zip(*rows, strict=True))
            for rows in zip(inside, cells, strict=True)
        ]
    problems = [
        FieldProblem(
            f"regions[{number - 1}]",
            "is covered by later regions: put it after them, or make it larger"
            if any(map(any, inside))
            else "is smaller than a latent: make it larger, or ask for larger pictures",
        )
        for number, inside in known.items()
        if not any(number in row for row in cells)
    ]
    if problems:
        places = "; ".join(f"{problem.path} {problem.message}" for problem in problems)
        raise InvalidRequest(f"A region has no place in the picture: {places}.", problems)
    return cells
