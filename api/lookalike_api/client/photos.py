"""What is uploaded: photos in a folder with their captions beside them, a zip, or single files."""

import mimetypes
import re
from collections.abc import Iterable
from pathlib import Path

from lookalike_platform.errors import InvalidRequest

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


def photos_of(photos: str | Path | Iterable[str | Path]) -> tuple[list[Path], dict[str, str]]:
    """The files to upload and the captions lying beside them."""
    if not isinstance(photos, (str, Path)):
        return [Path(photo) for photo in photos], {}
    path = Path(photos)
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise InvalidRequest(f"{path} is not here: give a folder of photos, or a zip file.")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise InvalidRequest(
            f"No photos in {path}: it needs {', '.join(sorted(PHOTO_SUFFIXES))} files."
        )
    captions = {
        file.name: text.read_text(encoding="utf-8").strip()
        for file in files
        if (text := file.with_suffix(".txt")).is_file()
    }
    return files, captions


def name_of(photos: str | Path | Iterable[str | Path]) -> str:
    """A set's name from its folder or zip: "My Dog" is `my-dog`."""
    named = Path(photos).absolute().stem if isinstance(photos, (str, Path)) else ""
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")[:63] or "subject"


def media_type(file: Path) -> str:
    return mimetypes.guess_type(file.name)[0] or "application/octet-stream"
