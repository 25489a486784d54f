"""Pictures made in the test: textured, so that they are sharp, and each unlike the others."""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Random blocks of colour, the same for the same seed."""
    generator = random.Random(seed)
    small = Image.frombytes("RGB", (12, 10), generator.randbytes(12 * 10 * 3))
    return small.resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(seed: int = 0) -> bytes:
    return encoded(picture(seed), quality=95)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has eight bytes of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(8)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def zipped(entries: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    buffer.seek(0)
    return buffer
