"""Photographs: each picture once, on one side of the split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.pretrain import photos


def photograph(path: Path, seed: int, side: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(path)


def test_a_picture_that_is_there_in_many_files_is_one_photograph(tmp_path: Path) -> None:
    sea, hill = tmp_path / "wallpapers/Sea/contents", tmp_path / "wallpapers/Hill/contents"
    photograph(sea / "images/800x600.png", 1)
    photograph(sea / "images/900x900.png", 1, side=300)
    photograph(sea / "images_dark/900x900.png", 2, side=250)
    photograph(sea / "screenshot.png", 1, side=400)
    photograph(hill / "images/800x600.png", 3)
    (hill / "images/900x900.png").symlink_to("800x600.png")
    photograph(tmp_path / "backgrounds/dusk.png", 4)
    photograph(tmp_path / "stamps/car.png", 5)
    photograph(tmp_path / "stamps/car_mirror.png", 6)
    photograph(tmp_path / "stamps/people/fireman.png", 7)
    photograph(tmp_path / "stamps/town/fireman.png", 7)
    photograph(tmp_path / "stamps/cartoon/cow.png", 8)
    photograph(tmp_path / "stamps/symbols/chess/rook.png", 9)
    photograph(tmp_path / "stamps/icon.png", 10, side=60)
    (tmp_path / "stamps/broken.png").write_bytes(b"no picture")
    assert [str(path.relative_to(tmp_path)) for path in photos.distinct(tmp_path)] == [
        "backgrounds/dusk.png",
        "stamps/car.png",
        "stamps/people/fireman.png",
        "wallpapers/Hill/contents/images/800x600.png",
        "wallpapers/Sea/contents/images/900x900.png",
    ]


def test_photographs_of_ones_own_are_cropped_as_held_out_ones_are(tmp_path: Path) -> None:
    photograph(tmp_path / "own/a/dusk.png", 1)
    photograph(tmp_path / "own/b.JPEG", 2)
    photograph(tmp_path / "own/c/icon.png", 3, side=60)
    photos.save_crops(photos.distinct(tmp_path / "own"), tmp_path / "data")
    own, held = photos.crops_below(tmp_path / "own"), photos.load_crops(tmp_path / "data")
    assert len(own) == 2 * photos.CROPS_PER_PHOTO
    assert all(np.array_equal(a, b) for a, b in zip(own, held, strict=True))


def test_a_damaged_photograph_is_named(tmp_path: Path) -> None:
    photograph(tmp_path / "dusk.png", 1)
    whole = (tmp_path / "dusk.png").read_bytes()
    (tmp_path / "dusk.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidRequest, match=r"dusk\.png is damaged"):
        photos.save_crops(photos.photographs(tmp_path), tmp_path / "crops")


@pytest.mark.parametrize("count", [2, 45])
def test_no_photograph_is_on_both_sides_of_the_split(count: int) -> None:
    crops = [np.full((1, 1, 3), photo, np.uint8) for photo in range(count) for _ in range(6)]
    kept, held = photos.split_crops(crops)
    assert {int(c[0, 0, 0]) for c in held} == set(range(0, count, 20))
    assert {int(c[0, 0, 0]) for c in kept} == set(range(count)) - set(range(0, count, 20))
