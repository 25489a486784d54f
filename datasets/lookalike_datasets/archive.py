"""Reading a zip of photos that may have been made to do harm.

`photo.txt` beside `photo.jpg` is its caption. What macOS adds (`__MACOSX`, dotfiles) is left out.
Sizes the archive states are not believed: bytes are counted as they are inflated.
"""

import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from lookalike_platform.errors import FieldProblem, InvalidRequest, TooLarge
from lookalike_platform.settings import Settings

MAX_ENTRIES = 2000
MAX_DIRECTORY_BYTES = 2 * 2**20
MAX_RATIO = 100  # photos are compressed already; 100:1 is a bomb or a blank page
RATIO_APPLIES_FROM = 2**20  # small files may shrink a lot and do no harm
MAX_CAPTION_BYTES = 16 * 2**10
NESTED = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
_PIECE = 2**16
# What zipfile raises on damaged input; ValueError and OSError come from places before the start.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError)


@dataclass(frozen=True)
class Archive:
    """The files in the archive's order, and captions by file name."""

    files: list[tuple[str, BinaryIO]]
    captions: dict[str, str]


def read_zip(file: BinaryIO, limits: Settings) -> Archive:
    """Reads all photos and captions into memory, at most `limits.max_upload_bytes` of them.

    Raises:
        InvalidRequest: not a zip, or an entry that no honest archive of photos has.
        TooLarge: more entries or inflated bytes than allowed.
    """
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            contents = _inflate_all(archive, limits)
    except _DAMAGE as error:
        raise InvalidRequest(f"The zip is damaged or not one: {error}") from error
    return _with_captions(contents)


def _check_directory(file: BinaryIO) -> None:
    """Bounds the table of contents before `zipfile` reads all of it into memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read(2**16 + 22)
    file.seek(0)
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) < place + 22:
        raise InvalidRequest("This is not a zip file. Upload a .zip, or the images themselves.")
    entries, directory_bytes = struct.unpack("<HI", tail[place + 10 : place + 16])
    if b"PK\x06\x07" in tail[max(0, place - 20) : place]:
        raise TooLarge("Zip64 archives are not read: upload fewer or smaller images.")
    if entries > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise TooLarge(f"The zip has too many entries; at most {MAX_ENTRIES} are read.")


def _inflate_all(archive: zipfile.ZipFile, limits: Settings) -> dict[str, bytes]:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise TooLarge(f"The zip has {len(entries)} entries; at most {MAX_ENTRIES} are read.")
    contents: dict[str, bytes] = {}
    left = limits.max_upload_bytes
    for entry in entries:
        name = unicodedata.normalize("NFC", entry.filename)
        problem = _problem(entry, name)
        if problem:
            raise _refusal(name, problem)
        parts = PurePosixPath(name).parts
        if entry.is_dir() or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        if name in contents:
            raise _refusal(name, "occurs twice")
        data = _inflate(archive, entry, name, min(left, limits.max_image_bytes))
        if data.startswith(b"PK\x03\x04"):
            raise _refusal(name, "is an archive inside the archive")
        left -= len(data)
        contents[name] = data
    return contents


def _problem(entry: zipfile.ZipInfo, name: str) -> str | None:
    path = PurePosixPath(name.replace("\\", "/"))
    mode = entry.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        return "points outside the archive"
    if any(unicodedata.category(character) == "Cc" for character in name):
        return "has control characters in its name"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an unusual way; use plain zip"
    if path.suffix.lower() in NESTED:
        return "is an archive inside the archive"
    return None


def _inflate(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, cap: int) -> bytes:
    data = bytearray()
    with archive.open(entry) as stream:
        while piece := stream.read(_PIECE):
            data += piece
            if len(data) > cap:
                raise TooLarge(f"{name} in the zip is too large: {cap:,} bytes were left for it.")
            ratio_cap = max(RATIO_APPLIES_FROM, MAX_RATIO * entry.compress_size)
            if len(data) > ratio_cap:
                raise _refusal(name, f"inflates more than {MAX_RATIO} times")
    return bytes(data)


def _with_captions(contents: dict[str, bytes]) -> Archive:
    """Texts beside an image become captions; all else is left for the intake to judge."""
    images = {
        str(PurePosixPath(name).with_suffix("")): name
        for name in contents
        if PurePosixPath(name).suffix.lower() in IMAGES
    }
    captions: dict[str, str] = {}
    files: list[tuple[str, BinaryIO]] = []
    for name, data in contents.items():
        path = PurePosixPath(name)
        image = images.get(str(path.with_suffix("")))
        if path.suffix.lower() != ".txt" or image is None:
            files.append((name, io.BytesIO(data)))
        elif len(data) > MAX_CAPTION_BYTES:
            raise _refusal(name, f"is too long for a caption: at most {MAX_CAPTION_BYTES:,} bytes")
        else:
            try:
                captions[image] = data.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise _refusal(name, "is not a caption in UTF-8") from None
    return Archive(files, captions)


def _refusal(name: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} in the zip {problem}.", [FieldProblem("archive", problem)])
