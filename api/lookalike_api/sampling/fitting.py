"""Uploaded pictures and masks in the size of what is painted. Torch-free."""

from pathlib import Path

from PIL import Image, ImageOps

from lookalike_platform.errors import InvalidRequest

GONE = "A picture that this generation starts from, or its mask, is gone: upload it again."


def fitted(path: Path, mode: str, size: tuple[int, int]) -> Image.Image:
    """A picture in this size; the middle of it, if its proportions are others.

    Raises InvalidRequest if it has been deleted since it was named.
    """
    try:
        opened = Image.open(path)
    except FileNotFoundError as error:
        raise InvalidRequest(GONE) from error
    with opened:
        image: Image.Image = opened
        if mode == "L" and opened.has_transparency_data:  # a mask's transparent parts are not white
            black = Image.new("RGBA", opened.size, "black")
            image = Image.alpha_composite(black, opened.convert("RGBA"))
        return ImageOps.fit(image.convert(mode), size, Image.Resampling.LANCZOS)
