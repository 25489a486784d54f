"""A contact sheet: rows of pictures under column heads, each row with its prompt."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN = 160, 6, 24
TITLE_SIZE, HEAD_SIZE, LABEL_SIZE = 28, 17, 15
INK, FAINT, PAPER = (24, 26, 32), (110, 114, 124), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """A label, and for each column the pictures in it, side by side."""

    label: str
    cells: list[list[Image.Image]]


def contact_sheet(title: str, notes: str, heads: list[str], rows: list[Row]) -> Image.Image:
    """Lay out pictures of any size as squares of CELL pixels.

    Args:
        heads: one for each cell of every row.
        rows: all with the same numbers of pictures in their cells.
    """
    widths = [len(cell) * (CELL + GAP) - GAP for cell in rows[0].cells]
    width = 2 * MARGIN + sum(widths) + 2 * MARGIN * (len(widths) - 1)
    top = MARGIN + TITLE_SIZE + LABEL_SIZE + 20
    first = top + HEAD_SIZE + 12
    height = first + len(rows) * (CELL + LABEL_SIZE + 22) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE_SIZE))
    draw.text((MARGIN, MARGIN + TITLE_SIZE + 8), notes, FAINT, _font(LABEL_SIZE))
    left = MARGIN
    for head, across in zip(heads, widths, strict=True):
        draw.text((left, top), head, INK, _font(HEAD_SIZE))
        left += across + 2 * MARGIN
    for number, row in enumerate(rows):
        y = first + number * (CELL + LABEL_SIZE + 22)
        left = MARGIN
        for pictures, across in zip(row.cells, widths, strict=True):
            for place, picture in enumerate(pictures):
                square = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
                sheet.paste(square, (left + place * (CELL + GAP), y))
            left += across + 2 * MARGIN
        # The first column shows the photos; the prompt belongs to the columns after it.
        draw.text(
            (MARGIN + widths[0] + 2 * MARGIN, y + CELL + 5), row.label, FAINT, _font(LABEL_SIZE)
        )
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
