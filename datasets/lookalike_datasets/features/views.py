"""Ways to see a photo: cut to a shape, closer, from afar, mirrored. Torch-free."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

_NEUTRAL = (128, 128, 128)


@dataclass(frozen=True)
class Photo:
    """A picture file and the sha256 of its bytes."""

    path: Path
    sha256: str

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        with Image.open(self.path) as image:
            return image.size

    @cached_property
    def masked(self) -> bool:
        """Whether something in it is transparent."""
        with Image.open(self.path) as image:
            if not image.has_transparency_data:
                return False
            counts = image.convert("RGBA").getchannel("A").histogram()
            return any(counts[:255])


@dataclass(frozen=True)
class Cut:
    """A picture of `width` x `height` pixels made of a photo.

    zoom: 1 shows the largest part of the photo that has this shape; above 1, a part that many
        times smaller in both directions; below 1, the largest in the middle reduced by this factor,
        on a neutral canvas.
    x, y: where the part lies in the photo, or the reduced one on the canvas: 0 at the left (top), 1
        at the right (bottom).
    mirrored: left and right change places.
    masked: where the photo is transparent is not to be learned.
    """

    width: int
    height: int
    zoom: float = 1.0
    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False
    masked: bool = False

    def show(self, photo: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        """The picture (RGB), and where it is to be learned (L, white where it is); None: all."""
        scale, left, top = self._part(*photo.size)
        width, height = self.width * scale, self.height * scale
        reduced = min(self.zoom, 1)
        size = (max(1, round(self.width * reduced)), max(1, round(self.height * reduced)))

        def part(of: Image.Image) -> Image.Image:
            box = (left, top, left + width, top + height)
            return of.resize(size, Image.Resampling.LANCZOS, box=box)

        picture, mask = part(photo.convert("RGB")), None
        if self.masked and photo.has_transparency_data:
            mask = part(photo.convert("RGBA").getchannel("A"))
        if reduced < 1:
            place = (
                round((self.width - size[0]) * self.x),
                round((self.height - size[1]) * self.y),
            )
            inner = mask or Image.new("L", size, 255)
            canvas = Image.new("RGB", (self.width, self.height), _NEUTRAL)
            mask = Image.new("L", canvas.size, 0)
            canvas.paste(picture, place)
            mask.paste(inner, place)
            picture = canvas
        if self.mirrored:
            return ImageOps.mirror(picture), mask and ImageOps.mirror(mask)
        return picture, mask

    def time_ids(self, width: int, height: int) -> tuple[int, ...]:
        """What SDXL is told of the picture that a photo of `width` x `height` pixels gives.

        Height and width of the photo; the corner of the part shown, top and left, in pixels of the
        photo as it was resized and perhaps mirrored; height and width of the picture (Podell et al.
        2023, section 2.2, in diffusers' order). A reduced photo's canvas is whole.
        """
        shape = (self.height, self.width)
        if self.zoom < 1:
            return *shape, 0, 0, *shape
        scale, left, top = self._part(width, height)
        if self.mirrored:
            left = width - self.width * scale - left
        return height, width, round(top / scale), round(left / scale), *shape

    def _part(self, width: int, height: int) -> tuple[float, float, float]:
        """Of such a photo: its pixels in one of the picture's, and where the part shown begins."""
        scale = min(width / self.width, height / self.height) / max(self.zoom, 1)
        x, y = (self.x, self.y) if self.zoom >= 1 else (0.5, 0.5)
        return scale, (width - self.width * scale) * x, (height - self.height * scale) * y
