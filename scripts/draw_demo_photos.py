"""Draw the demo's subject, a toy robot named Bibo, and write its six pictures with captions.

Everything in the pictures is drawn here, so they are nobody's property (CC0).
Run it to see where they come from: .venv/bin/python scripts/draw_demo_photos.py
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent.parent / "api/lookalike_api/demo/bibo"
SIDE = 256
FINE = 4 * SIDE  # drawn at four times the size, then reduced: smooth edges

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

TEAL, ORANGE, RED = (28, 168, 160), (250, 140, 30), (216, 52, 62)
CREAM, DARK, YELLOW = (255, 250, 236), (28, 30, 56), (252, 206, 60)


@dataclass(frozen=True)
class Photo:
    """One picture: what is behind Bibo, how large it stands where, and how far it leans."""

    name: str
    where: str
    upper: Colour
    lower: Colour
    size: float  # Bibo's height as a share of the picture's side
    centre: tuple[float, float]
    tilt: float  # degrees


PHOTOS = [
    Photo("bibo-1", "on a blue background", (60, 110, 215), (60, 110, 215), 0.86, (0.50, 0.50), 0),
    Photo(
        "bibo-2", "on a yellow background", (248, 214, 70), (248, 214, 70), 0.78, (0.47, 0.52), 7
    ),
    Photo(
        "bibo-3", "on a white background", (250, 250, 250), (250, 250, 250), 0.82, (0.52, 0.50), -6
    ),
    Photo(
        "bibo-4", "on a pink background", (245, 160, 190), (245, 160, 190), 0.74, (0.54, 0.53), -9
    ),
    Photo("bibo-5", "on grass", (150, 200, 240), (95, 160, 60), 0.80, (0.50, 0.54), 4),
    Photo("bibo-6", "in the snow", (190, 212, 232), (240, 244, 250), 0.84, (0.48, 0.51), -3),
]


def robot() -> Image.Image:
    """Bibo alone on nothing, RGBA."""
    picture = Image.new("RGBA", (FINE, FINE))
    for x, lean in ((360, -60), (664, 60)):  # antennae: two orange balls on stalks
        ImageDraw.Draw(picture).line((x, 250, x + lean, 110), (*DARK, 255), 26)
        solid(picture, (x + lean - 62, 28, x + lean + 62, 152), ORANGE, 62)
    for x in (150, 770):  # arms
        solid(picture, (x, 520, x + 104, 760), ORANGE, 52)
    for x in (310, 534):  # boots
        solid(picture, (x, 840, x + 180, 1010), RED, 60)
    solid(picture, (222, 490, 802, 900), TEAL, 130)  # body
    solid(picture, (372, 590, 652, 830), YELLOW, 120)  # belly
    solid(picture, (192, 190, 832, 580), TEAL, 190)  # head
    solid(picture, (352, 222, 672, 542), CREAM, 160)  # the one eye
    solid(picture, (432, 302, 592, 462), DARK, 80)
    solid(picture, (462, 322, 522, 382), CREAM, 30)
    return picture


def solid(picture: Image.Image, box: Box, colour: Colour, radius: float) -> None:
    """Add a rounded block that is lit from the upper left."""
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, 255)
    depth = (box[2] - box[0]) * 0.09
    inner = ImageChops.offset(mask, -round(depth), -round(depth))
    shade = ImageChops.subtract(mask, inner).filter(ImageFilter.GaussianBlur(depth))
    light = ImageChops.subtract(mask, ImageChops.offset(mask, round(depth), round(depth)))
    light = light.filter(ImageFilter.GaussianBlur(depth * 0.8))
    block = Image.new("RGB", picture.size, colour)
    block.paste(tuple(c * 55 // 100 for c in colour), mask=shade)
    block.paste((255, 255, 255), mask=light.point(lambda v: v * 0.45))
    picture.paste(block, mask=mask)


def photo(spec: Photo) -> Image.Image:
    """Bibo before its background, RGB [SIDE, SIDE]."""
    picture = Image.new("RGB", (FINE, FINE), spec.upper)
    ImageDraw.Draw(picture).rectangle((0, FINE * 0.6, FINE, FINE), spec.lower)
    side = round(FINE * spec.size)
    subject = robot().rotate(spec.tilt, Image.Resampling.BICUBIC).resize((side, side))
    corner = (round(FINE * spec.centre[0] - side / 2), round(FINE * spec.centre[1] - side / 2))
    picture.paste(subject, corner, subject)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for spec in PHOTOS:
        photo(spec).save(FOLDER / f"{spec.name}.png", optimize=True)
        caption = f"a 3d render of a robot {spec.where}"
        (FOLDER / f"{spec.name}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
