"""Fetching and preparing the art, from packages made by hand in the layout of the real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lookalike_platform.errors import CapabilityMissing, TrainingFailed
from lookalike_trainers.pretrain import sources
from lookalike_trainers.pretrain.nouns import STYLES
from lookalike_trainers.pretrain.photos import CROPS_PER_PHOTO
from lookalike_trainers.pretrain.scenes import load_sprites


def drawing(side: int = 256) -> Image.Image:
    """A clear ground with an opaque green bar, twice as wide as high, off the middle."""
    picture = np.zeros((side, side, 4), np.uint8)
    picture[side // 8 : side // 4, side // 4 : side // 2] = (20, 160, 60, 255)
    return Image.fromarray(picture)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Cat in all three styles, ox (held out) too, dog without Noto's; one photograph."""
    root = tmp_path / "packages"
    codes = {"cat": "1F408", "ox": "1F402-FE0F", "dog": "1F415"}
    files = {
        "names/package/en/data.json": json.dumps(
            [{"label": name, "hexcode": code} for name, code in codes.items()]
        ),
        "noto/package/chars.json": json.dumps({"1f408": "cat", "1f402": "ox"}),
        "noto/package/icons.json": json.dumps({"icons": {n: {"body": ""} for n in ("cat", "ox")}}),
    }
    for code in ("1f408", "1f402-fe0f", "1f415"):
        files[f"twemoji/package/{code}.svg"] = "<svg/>"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assets = root / "fluent" / "package" / "assets"
    assets.mkdir(parents=True)
    for code in ("1f408", "1f402", "1f415"):
        drawing().save(assets / f"{code}.webp", lossless=True)
    (root / "debian" / "usr").mkdir(parents=True)
    Image.new("RGB", (300, 200), "teal").save(root / "debian" / "usr" / "sea.jpg")
    Image.new("RGB", (20, 20)).save(root / "debian" / "usr" / "icon.png")
    return tmp_path


def test_nouns_found_in_all_styles_become_cropped_sprites_and_photographs_crops(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_rasterise", lambda svg: drawing())
    sources.prepare(packages)
    nouns = json.loads((packages / "nouns.json").read_text())
    assert nouns == {"training": ["cat"], "held_out": ["ox"]}
    sprites = load_sprites(packages, ["cat", "ox"])
    assert len(sprites) == 2 * len(STYLES)
    for sprite in sprites.values():  # the bar fills the width, and half of the height
        opaque = sprite[..., 3] > 128
        assert np.flatnonzero(opaque.any(0)).size == 96
        assert abs(np.flatnonzero(opaque.any(1)).size - 48) <= 2
    crops = sorted((packages / "photos").iterdir())
    assert len(crops) == CROPS_PER_PHOTO  # the icon is too small to be one
    with Image.open(crops[0]) as crop:
        assert crop.size == (96, 96)


def test_a_client_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(CapabilityMissing, match="no-such-client"):
        sources._client("no-such-client", "pack", cwd=tmp_path)
    with pytest.raises(TrainingFailed, match="ls nowhere"):
        sources._client("ls", "nowhere", cwd=tmp_path)


def test_a_package_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fetch(*, stopped: bool) -> None:
        with sources._whole(tmp_path / "noto") as folder:
            (folder / "file").touch()
            if stopped:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(stopped=True)
    assert list(tmp_path.iterdir()) == []
    fetch(stopped=False)
    assert (tmp_path / "noto" / "file").exists()
    assert len(list(tmp_path.iterdir())) == 1
