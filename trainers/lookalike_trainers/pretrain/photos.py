"""Photographs, for the autoencoder alone: one file a picture, cropped, and split by picture."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lookalike_platform.errors import InvalidRequest, NotFound
from lookalike_platform.files import sha256_file
from lookalike_trainers.pretrain.scenes import SIZE

CROP_SIZE = 96
CROPS_PER_PHOTO = 6
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def photographs(folder: Path) -> list[Path]:
    """The pictures below ``folder`` that are large enough to crop, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return [path for path in files if min(_size(path)) >= 2 * CROP_SIZE]


def distinct(folder: Path) -> list[Path]:
    """The photographs below ``folder``, an unpacked set of Debian packages, each picture once.

    A wallpaper is there in many sizes, perhaps light and dark, and as a screenshot: its largest
    file stands for it.  Of the stamps, drawings and symbols are left out, and mirrored ones.
    """
    pictures: dict[str, Path] = {}
    for path in photographs(folder):
        parts = path.relative_to(folder).parts
        if "wallpapers" in parts:
            if not parts[-2].startswith("images"):
                continue
            picture = parts[parts.index("wallpapers") + 1]
        elif {"cartoon", "symbols"} & set(parts) or path.stem.endswith("_mirror"):
            continue
        else:  # some stamps lie in two folders
            picture = sha256_file(path)
        if picture not in pictures or _pixels(path) > _pixels(pictures[picture]):
            pictures[picture] = path
    return list(pictures.values())


def save_crops(files: Iterable[Path], folder: Path) -> None:
    """Write ``CROPS_PER_PHOTO`` crops of every file into a new ``folder``, numbered through."""
    folder.mkdir(parents=True)
    crops = (crop for file in files for crop in _crops(file))
    for i, crop in enumerate(crops):
        crop.save(folder / f"{i:05d}.jpg", quality=95)


def load_crops(folder: Path) -> list[NDArray[np.uint8]]:
    """What ``save_crops`` wrote, RGB [64, 64, 3], in the order of its files."""
    crops = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as picture:
            crops.append(np.asarray(picture.convert("RGB").resize((SIZE, SIZE))))
    return crops


def crops_below(folder: Path) -> list[NDArray[np.uint8]]:
    """Crops of every photograph below ``folder``, through JPEG as those of the data folder are.

    Raises ``NotFound`` where there is none.
    """
    files = photographs(folder)
    if not files:
        raise NotFound(
            f"there is no photograph in {folder}: give a folder of JPEG, PNG or WebP files of "
            f"at least {2 * CROP_SIZE} pixels a side"
        )
    with TemporaryDirectory() as name:
        save_crops(files, Path(name) / "photos")
        return load_crops(Path(name) / "photos")


def split_crops(
    crops: list[NDArray[np.uint8]],
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Training and held-out crops: all crops of every twentieth photograph are kept out.

    Raises ``NotFound`` where there are not two photographs, one for each part.
    """
    if len(crops) <= CROPS_PER_PHOTO:
        raise NotFound(
            "the data folder has no two photographs, to train on and to hold out: run "
            "`lookalike pretrain data` again"
        )
    held = [i // CROPS_PER_PHOTO % 20 == 0 for i in range(len(crops))]
    kept = [crop for crop, out in zip(crops, held, strict=True) if not out]
    return kept, [crop for crop, out in zip(crops, held, strict=True) if out]


def _size(path: Path) -> tuple[int, int]:
    """Width and height; of a file that is no picture, nought."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError:
        return 0, 0


def _pixels(path: Path) -> int:
    width, height = _size(path)
    return width * height


def _crops(path: Path) -> Iterator[Image.Image]:
    """``CROPS_PER_PHOTO`` square crops of a photograph; a stamp's clear ground becomes white.

    Two corners and the centre, at full and at half size, so that some crops hold fine texture.
    """
    try:
        with Image.open(path) as opened:
            photo = opened.convert("RGBA")
    except OSError as error:
        raise InvalidRequest(f"the photograph {path} is damaged: {error}; remove it") from error
    ground = Image.new("RGBA", photo.size, "white")
    rgb = Image.alpha_composite(ground, photo).convert("RGB")
    rgb.thumbnail((900, 900))
    for scale in (1.0, 0.5):
        side = int(min(rgb.size) * scale)
        for x, y in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
            left, top = int((rgb.width - side) * x), int((rgb.height - side) * y)
            crop = rgb.crop((left, top, left + side, top + side))
            yield crop.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS)
