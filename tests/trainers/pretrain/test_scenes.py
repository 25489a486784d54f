import random

import numpy as np
import pytest

from lookalike_trainers.pretrain.latents import paint_scenes, training_pairs
from lookalike_trainers.pretrain.nouns import (
    STYLES,
    held_out_nouns,
    held_out_pairs,
    training_nouns,
)
from lookalike_trainers.pretrain.scenes import (
    COLOURS,
    Mix,
    Scene,
    Sprites,
    article,
    caption,
    draw_scene,
    paint,
)


def test_captions_say_noun_style_background_size_and_position() -> None:
    assert caption(Scene(("ant",), "fluent", "red")) == "a 3d render of an ant on a red background"
    assert (
        caption(Scene(("owl",), "noto", "sea", "small")) == "a painting of a small owl on the sea"
    )
    assert (
        caption(Scene(("cat",), "twemoji", "orange", "left"))
        == "a flat icon of a cat on the left on an orange background"
    )
    two = Scene(("cat", "grapes"), "twemoji", "grass")
    assert caption(two, with_style=False) == "a cat and grapes on grass"


@pytest.mark.parametrize(
    ("noun", "words"),
    [("unicorn", "a unicorn"), ("umbrella", "an umbrella"), ("bus", "a bus"), ("fries", "fries")],
)
def test_articles(noun: str, words: str) -> None:
    assert article(noun) == words


def test_the_picture_shows_what_the_caption_says(sprites: Sprites) -> None:
    """Every pixel is the background's colour or the sprite's, each where the scene puts it."""
    picture = paint(Scene(("cat", "dog"), "noto", "teal"), sprites, random.Random(0)).astype(int)
    assert np.abs(picture[2, 2] - COLOURS["teal"]).max() <= 7
    assert np.abs(picture[32, 17] - sprites["cat", "noto"][48, 48, :3].astype(int)).max() <= 2
    assert np.abs(picture[32, 47] - sprites["dog", "noto"][48, 48, :3].astype(int)).max() <= 2


@pytest.mark.parametrize(("layout", "x", "y"), [("left", 17, 32), ("bottom", 32, 47)])
def test_positions(sprites: Sprites, layout: str, x: int, y: int) -> None:
    scene = Scene(("fox",), "fluent", "white", layout)  # type: ignore[arg-type]
    picture = paint(scene, sprites, random.Random(1)).astype(int)
    opaque = np.abs(picture - np.array(COLOURS["white"])).max(2) > 40
    ys, xs = np.nonzero(opaque)
    assert abs(xs.mean() - x) < 3
    assert abs(ys.mean() - y) < 3


def test_held_out_pairs_are_never_sampled() -> None:
    nouns = training_nouns()
    held, rng = held_out_pairs(nouns), random.Random(0)
    pairs = training_pairs(nouns)
    assert len(held) >= 200
    assert len(pairs) + len(held) == 3 * len(nouns)
    shown = set()
    for _ in range(5000):
        scene = draw_scene(rng, pairs, Mix(two_objects=0.5))
        shown |= {(noun, scene.style) for noun in scene.nouns}
    assert not shown & held
    assert {noun for noun, _ in shown} == set(nouns)


def test_held_out_nouns_are_apart() -> None:
    held = set(held_out_nouns())
    assert len(held) >= 60
    assert not held & set(training_nouns())
    assert set(STYLES) == {"fluent", "noto", "twemoji"}


def test_scenes_repeat_under_a_seed(sprites: Sprites) -> None:
    pairs = sorted(sprites)
    first = list(paint_scenes(20, pairs, sprites, Mix(), seed=3))
    again = list(paint_scenes(20, pairs, sprites, Mix(), seed=3))
    assert [text for text, _ in first] == [text for text, _ in again]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
