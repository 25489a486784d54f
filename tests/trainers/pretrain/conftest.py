"""A pretend world of three nouns and networks of a few thousand parameters."""

from pathlib import Path

import numpy as np
import pytest

from lookalike_trainers.pretrain.nouns import STYLES
from lookalike_trainers.pretrain.scenes import SIZE, Sprites
from lookalike_trainers.pretrain.text import Sizes, new_folder

NOUNS = ["cat", "dog", "fox"]


@pytest.fixture(scope="session")
def sprites() -> Sprites:
    """Opaque discs, each (noun, style) of its own shade."""
    y, x = np.mgrid[0:96, 0:96]
    disc = (y - 48) ** 2 + (x - 48) ** 2 < 44**2
    out: Sprites = {}
    for i, noun in enumerate(NOUNS):
        for j, style in enumerate(STYLES):
            picture = np.zeros((96, 96, 4), np.uint8)
            picture[disc] = (80 * i + 20, 100 * j + 20, 128, 255)
            out[noun, style] = picture
    return out


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained networks in diffusers layout."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    sizes = Sizes(
        text_width=16,
        text_layers=1,
        text_length=16,
        unet=(16, 32),
        heads=(2, 2),
        vae=(8, 8, 16),
        sample=SIZE // 4,
    )
    new_folder(folder, ["a painting of a cat on a red background"] * 2, sizes)
    return folder
