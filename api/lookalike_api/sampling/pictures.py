"""Pictures as files that say how they were made."""

from collections.abc import Sequence

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lookalike_api.sampling.messages import SampleOrder


def save(pictures: Sequence[Image.Image], order: SampleOrder) -> list[str]:
    """Write an order's pictures into its folder; their paths."""
    images = []
    for number, picture in enumerate(pictures):
        text = PngInfo()
        text.add_text("parameters", order.parameters[number])
        path = order.folder / f"{number}.png"
        picture.save(path, pnginfo=text)
        images.append(str(path))
    return images
