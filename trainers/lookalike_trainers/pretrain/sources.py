"""Fetch the packages that carry the art and prepare it: sprites as WebP, photographs as JPEG.

Sources and licences: Fluent Emoji 3D (MIT), Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), names
from emojibase-data (MIT); photographs of Debian's wallpaper packages and Tux Paint's stamps.
Everything lands under one data folder outside the repository:

    sprites/{style}/{noun}.webp   96 x 96 RGBA, cropped to what is opaque
    photos/{number}.jpg           96 x 96 RGB crops, for the autoencoder alone
    nouns.json                    the nouns found in all three styles
"""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image

from lookalike_platform.errors import CapabilityMissing, TrainingFailed
from lookalike_trainers.pretrain.nouns import STYLES, held_out_nouns, label, training_nouns
from lookalike_trainers.pretrain.photos import distinct, save_crops

NPM_PACKAGES = {
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@twemoji/svg@15.0.0",
    "names": "emojibase-data@17.0.0",
}
DEBIAN_PACKAGES = (
    "plasma-workspace-wallpapers",
    "lomiri-wallpapers-20.04",
    "tuxpaint-stamps-default",
)
SPRITE_SIZE = 96


def fetch(data: Path) -> None:
    """Download and unpack the packages under ``data/packages`` with npm and apt-get.

    A package already there is left alone; each appears whole or not at all.
    Raises ``CapabilityMissing`` where a client is not installed, ``TrainingFailed`` with the
    client's own words where it fails.
    """
    packages = data / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name, package in NPM_PACKAGES.items():
        if not (packages / name).exists():
            with _whole(packages / name) as folder:
                packed = _client("npm", "pack", "--silent", package, cwd=folder)
                archive = folder / packed.split()[-1]
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
                archive.unlink()
    if not (packages / "debian").exists():
        with _whole(packages / "debian") as folder:
            _client("apt-get", "download", *DEBIAN_PACKAGES, cwd=folder)
            for archive in folder.glob("*.deb"):
                _client("dpkg-deb", "-x", archive.name, ".", cwd=folder)
                archive.unlink()


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` once the block has ended without an error."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / folder.name
        made.mkdir()
        yield made
        made.replace(folder)


def _client(*command: str, cwd: Path) -> str:
    """Run a package client in ``cwd`` and return what it printed."""
    if shutil.which(command[0]) is None:
        raise CapabilityMissing(f"fetching the art needs {command[0]}, which is not installed")
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise TrainingFailed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def prepare(data: Path) -> None:
    """Turn the unpacked packages into sprites, photograph crops and ``nouns.json``."""
    codes = _hexcodes(data / "packages" / "names")
    found: dict[str, list[str]] = {"training": [], "held_out": []}
    for part, nouns in (("training", training_nouns()), ("held_out", held_out_nouns())):
        for noun in nouns:
            pictures = {s: _picture(data / "packages", s, codes.get(label(noun))) for s in STYLES}
            if any(picture is None for picture in pictures.values()):
                continue
            for style, picture in pictures.items():
                if picture is not None:
                    _save_sprite(picture, data / "sprites" / style / f"{noun}.webp")
            found[part].append(noun)
    (data / "nouns.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    photos = data / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    save_crops(distinct(data / "packages" / "debian"), photos)


def _hexcodes(package: Path) -> dict[str, str]:
    """Label to lower-case hexcode without variation selectors, from emojibase-data."""
    entries = json.loads((package / "package" / "en" / "data.json").read_text())
    return {e["label"]: e["hexcode"].lower().replace("-fe0f", "") for e in entries}


def _picture(packages: Path, style: str, code: str | None) -> Image.Image | None:
    """The art of one emoji in one style as RGBA, or None where the package lacks it."""
    if code is None:
        return None
    if style == "noto":
        svg = _noto_svg(packages / "noto" / "package", code)
        return None if svg is None else _rasterise(svg)
    if style == "fluent":
        folder, suffix = packages / "fluent" / "package" / "assets", "webp"
    else:
        folder, suffix = packages / "twemoji" / "package", "svg"
    for name in (code, f"{code}-fe0f"):
        path = folder / f"{name}.{suffix}"
        if path.exists():
            if suffix == "svg":
                return _rasterise(path.read_bytes())
            with Image.open(path) as picture:
                return picture.convert("RGBA")
    return None


@cache
def _noto(package: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Hexcode to icon name, and icon name to icon."""
    chars = json.loads((package / "chars.json").read_text())
    return chars, json.loads((package / "icons.json").read_text())["icons"]


def _noto_svg(package: Path, code: str) -> bytes | None:
    chars, icons = _noto(package)
    name = chars.get(code) or chars.get(f"{code}-fe0f")
    if name is None or name not in icons:
        return None
    body = icons[name]["body"]
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return f'{head}viewBox="0 0 128 128">{body}</svg>'.encode()


def _rasterise(svg: bytes) -> Image.Image:
    try:
        import cairosvg
    except ModuleNotFoundError:
        raise CapabilityMissing(
            "drawing the art needs cairosvg: pip install 'lookalike[pretrain]'"
        ) from None

    png = cairosvg.svg2png(bytestring=svg, output_width=256, output_height=256)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _save_sprite(picture: Image.Image, path: Path) -> None:
    """Crop to the opaque box, pad to a square, resize, save."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    picture = picture.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS).save(path, quality=92)
