"""Scenes: what a training picture shows, the caption that says so, and the picture itself.

A ``Scene`` is drawn at random (``draw_scene``), captioned (``caption``) and painted (``paint``).
Whatever the caption leaves unsaid about size and place has one usual value (one large object in
the middle), so that little is left for the denoiser to guess.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lookalike_platform.errors import NotFound
from lookalike_trainers.pretrain.nouns import STYLES

SIZE = 64  # pixels of a side

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (248, 214, 70),
    "green": (40, 155, 75),
    "teal": (15, 130, 125),
    "blue": (60, 110, 215),
    "purple": (125, 65, 175),
    "pink": (245, 160, 190),
    "brown": (125, 80, 45),
    "gray": (140, 140, 145),
    "black": (22, 22, 28),
    "white": (250, 250, 250),
}

# Words of the caption, colour of the upper and of the lower part, height of the horizon (0 top).
PLACES: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int], float]] = {
    "grass": ("on grass", (150, 200, 240), (95, 160, 60), 0.6),
    "beach": ("on the beach", (120, 195, 240), (228, 200, 140), 0.6),
    "snow": ("in the snow", (190, 212, 232), (240, 244, 250), 0.55),
    "night sky": ("in the night sky", (16, 20, 58), (34, 36, 90), 0.7),
    "sea": ("on the sea", (165, 210, 240), (25, 105, 170), 0.5),
}

Layout = Literal["usual", "small", "left", "right", "top", "bottom"]
PLACE_OF_LAYOUT: dict[Layout, tuple[float, float, float]] = {  # centre x, centre y, size
    "usual": (0.5, 0.5, 0.8),
    "small": (0.5, 0.5, 0.45),
    "left": (0.27, 0.5, 0.5),
    "right": (0.73, 0.5, 0.5),
    "top": (0.5, 0.27, 0.5),
    "bottom": (0.5, 0.73, 0.5),
}
LAYOUT_WORDS: dict[Layout, str] = {
    "usual": "",
    "small": "",
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
}

Sprites = dict[tuple[str, str], NDArray[np.uint8]]
"""(noun, style) to an RGBA picture [96, 96, 4]."""


@dataclass(frozen=True)
class Scene:
    """One or two nouns of one style, side by side in reading order, on one background."""

    nouns: tuple[str, ...]
    style: str
    background: str
    layout: Layout = "usual"


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of scene; what remains is one usual object on a plain colour."""

    two_objects: float = 0.3
    places: float = 0.2
    odd_layouts: float = 0.12
    style_unsaid: float = 0.05


def load_sprites(data: Path, nouns: list[str]) -> Sprites:
    """Read ``sprites/{style}/{noun}.webp`` of the data folder.

    Raises ``NotFound`` that names the sprite that is not there or no picture.
    """
    sprites: Sprites = {}
    for style in STYLES:
        for noun in nouns:
            path = data / "sprites" / style / f"{noun}.webp"
            try:
                with Image.open(path) as picture:
                    sprites[noun, style] = np.asarray(picture.convert("RGBA"))
            except OSError:
                raise NotFound(
                    f"the sprite {path} is missing or damaged: run `lookalike pretrain data` again"
                ) from None
    return sprites


def draw_scene(rng: random.Random, pairs: list[tuple[str, str]], mix: Mix) -> Scene:
    """A scene made of ``pairs`` (noun, style) alone: no pair outside the list is ever shown."""
    noun, style = rng.choice(pairs)
    if rng.random() < mix.places:
        background = rng.choice(list(PLACES))
    else:
        background = rng.choice(list(COLOURS))
    if rng.random() < mix.two_objects:
        others = [n for n, s in pairs if s == style and n != noun]
        if others:
            return Scene((noun, rng.choice(others)), style, background)
    layout: Layout = "usual"
    if rng.random() < mix.odd_layouts:
        layout = rng.choice(["small", "left", "right", "top", "bottom"])
    return Scene((noun,), style, background, layout)


def article(noun: str) -> str:
    """``noun`` with its indefinite article; plurals and masses take none."""
    if noun.endswith("s") and noun not in {"octopus", "cactus", "bus", "hibiscus", "glasses"}:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def caption(scene: Scene, *, with_style: bool = True) -> str:
    """The sentence that says noun, style, background, size and position of a scene."""
    things = " and ".join(article(noun) for noun in scene.nouns)
    if scene.layout == "small":
        things = "a small " + things.removeprefix("an ").removeprefix("a ")
    if scene.background in COLOURS:
        where = f"on {article(scene.background)} background"
    else:
        where = PLACES[scene.background][0]
    style = f"{STYLES[scene.style]} " if with_style else ""
    return f"{style}{things}{LAYOUT_WORDS[scene.layout]} {where}"


def paint(scene: Scene, sprites: Sprites, rng: random.Random) -> NDArray[np.uint8]:
    """The picture of a scene, RGB [64, 64, 3]; ``rng`` moves places, sizes and shades a little."""
    picture = paint_background(scene.background, rng)
    if len(scene.nouns) == 2:
        spots = [(0.27, 0.5, 0.47), (0.73, 0.5, 0.47)]
    else:
        spots = [PLACE_OF_LAYOUT[scene.layout]]
    for noun, (x, y, size) in zip(scene.nouns, spots, strict=True):
        side = round(SIZE * size * rng.uniform(0.95, 1.05))
        left = round(x * SIZE - side / 2 + rng.uniform(-1.5, 1.5))
        top = round(y * SIZE - side / 2 + rng.uniform(-1.5, 1.5))
        _paste(picture, sprites[noun, scene.style], side, left, top)
    return picture.clip(0, 255).astype(np.uint8)


def paint_background(background: str, rng: random.Random) -> NDArray[np.float32]:
    """A plain colour or a place, [64, 64, 3] on 0..255."""
    noise = np.random.default_rng(rng.getrandbits(32))
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    shade = np.array([rng.uniform(-6, 6) for _ in range(3)], np.float32)
    if background in COLOURS:
        picture[:] = np.array(COLOURS[background], np.float32) + shade
        return picture
    _, upper, lower, height = PLACES[background]
    horizon = round(SIZE * (height + rng.uniform(-0.04, 0.04)))
    picture[:horizon] = np.array(upper, np.float32) + shade
    picture[horizon:] = np.array(lower, np.float32) + shade
    if background == "grass":
        picture[horizon:] += noise.normal(0, 9, (SIZE - horizon, SIZE, 1))
    elif background == "beach":
        picture[horizon:] += noise.normal(0, 5, (SIZE - horizon, SIZE, 1))
        picture[horizon - 6 : horizon] = (50, 130, 190)
    elif background == "sea":
        picture[horizon + 2 :: 5] += 22
    else:  # snowflakes, stars
        for _ in range(40 if background == "snow" else 28):
            y = rng.randrange(SIZE if background == "snow" else horizon)
            picture[y, rng.randrange(SIZE)] = 255 if background == "snow" else rng.uniform(140, 255)
    return picture


def _paste(
    picture: NDArray[np.float32], sprite: NDArray[np.uint8], side: int, left: int, top: int
) -> None:
    """Blend an RGBA sprite of ``side`` pixels into ``picture`` in place, cut at its borders."""
    resized = Image.fromarray(sprite).resize(
        (side, side), Image.Resampling.BILINEAR, reducing_gap=2
    )
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
    patch = np.asarray(resized, np.float32)[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = patch[..., 3:] / 255
    picture[y0:y1, x0:x1] = picture[y0:y1, x0:x1] * (1 - alpha) + patch[..., :3] * alpha
