"""Uploaded pictures and masks in the size of what is painted. Torch-free."""

from pathlib import Path

from PIL import Image, ImageOps


def fitted(path: Path, mode: str, size: tuple[int, int]) -> Image.Image:
    """A picture in this size; the middle of it, if its proportions are others."""
    with Image.open(path) as image:
        return ImageOps.fit(image.convert(mode), size, Image.Resampling.LANCZOS)
