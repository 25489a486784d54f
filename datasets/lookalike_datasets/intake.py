"""One uploaded file: is it a photo to learn from? If so, its pixels as a clean PNG.

Only pixels survive: metadata (EXIF, GPS, XMP) and bytes after the image are dropped. Nothing is
decoded before its format, size and dimensions are known to be harmless.
"""

import io
import warnings
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image, ImageCms, ImageFilter, ImageOps, ImageStat

from lookalike_platform.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")

# Pillow warns of decompression bombs above MAX_IMAGE_PIXELS and raises above twice that; both
# are a refusal here. Set once for the process: filters inside a function are not thread-safe.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

BLUR_SIDE = 512
BLUR_THRESHOLD = 30.0
"""Variance of the Laplacian below which a photo counts as blurry (Pech-Pacheco et al. 2000).

Measured at 512 pixels, about what training sees: photos of the DreamBench subjects have 96 or more
there, the same photos after a Gaussian blur of radius 3 at most 15. A soft background lowers it,
so it is a warning and no more.
"""

NEAR_DUPLICATE_BITS = 6
"""Of the 64 bits of the difference hash: copies that were scaled or saved again differ in 0–4."""


@dataclass(frozen=True)
class Verdict:
    """Accepted with `png`, `width`, `height` and `hash`; or refused with a `reason`."""

    filename: str
    accepted: bool
    reason: str | None = None
    warnings: list[str] = field(default_factory=list)
    png: bytes = b""
    width: int | None = None
    height: int | None = None
    hash: int = 0  # difference hash of 64 bits


class _Refused(Exception):
    """Why a file is not accepted, in words for its owner."""


def examine(
    filename: str, file: BinaryIO, limits: Settings, *, to_learn_from: bool = True
) -> Verdict:
    """Judges a file by its content; its name and stated type count for nothing.

    Args:
        file: read up to `limits.max_image_bytes` + 1.
        to_learn_from: warn of what teaches little.
    """
    try:
        data = _read(file, limits.max_image_bytes)
        image, notes = _decode(data, limits)
    except _Refused as refused:
        return Verdict(filename, accepted=False, reason=str(refused))
    if to_learn_from and is_blurry(image):
        notes.append("looks blurry: a sharper photo teaches more")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Verdict(
        filename,
        accepted=True,
        warnings=notes,
        png=buffer.getvalue(),
        width=image.width,
        height=image.height,
        hash=difference_hash(image),
    )


def is_blurry(image: Image.Image) -> bool:
    """Whether the RGB image has hardly any edges at `BLUR_SIDE` pixels."""
    gray = image.convert("L")
    gray.thumbnail((BLUR_SIDE, BLUR_SIDE), Image.Resampling.LANCZOS)
    # Offset 128 keeps negative responses; clipping at ±128 cannot make a sharp photo blurry.
    kernel = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
    edges = gray.filter(kernel).crop((1, 1, gray.width - 1, gray.height - 1))
    return ImageStat.Stat(edges).var[0] < BLUR_THRESHOLD


def difference_hash(image: Image.Image) -> int:
    """64 bits: is each pixel of the 9 x 8 reduction brighter than its left neighbour?"""
    pixels = image.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            left, right = pixels[row * 9 + column : row * 9 + column + 2]
            bits = bits << 1 | (right > left)
    return bits


def looks_alike(one: int, other: int) -> bool:
    """Whether two difference hashes are those of nearly the same picture."""
    return (one ^ other).bit_count() <= NEAR_DUPLICATE_BITS


def _read(file: BinaryIO, cap: int) -> bytes:
    data = bytearray()
    while len(data) <= cap and (piece := file.read(min(2**20, cap + 1 - len(data)))):
        data += piece
    if len(data) > cap:
        raise _Refused(f"is larger than {cap / 2**20:.0f} MiB")
    if not data:
        raise _Refused("is empty")
    return bytes(data)


def _decode(data: bytes, limits: Settings) -> tuple[Image.Image, list[str]]:
    """Pixels in sRGB, upright, what is transparent on white; and warnings."""
    image = _open(data)
    width, height = image.size
    if max(width, height) > limits.max_image_side:
        raise _Refused(
            f"is {width} x {height} pixels; the longer side may have {limits.max_image_side}"
        )
    if min(width, height) < limits.min_image_side:
        raise _Refused(
            f"is too small: {width} x {height} pixels, and the shorter side needs"
            f" {limits.min_image_side}"
        )
    # A JPEG with several pictures (MPO) is a photo with a depth map or a preview: the first counts.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise _Refused("is animated; upload one still picture")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_srgb(image)
    except Exception as error:
        # Decoders fail in many ways on hostile bytes; each means the same to the owner.
        raise _Refused(f"is damaged or truncated ({error})") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Refused("has too many pixels") from None
    except Exception:
        hint = " (HEIC: export it as JPEG)" if data[4:8] == b"ftyp" else ""
        raise _Refused(f"is not a JPEG, PNG or WebP picture{hint}") from None


def _to_srgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Of a cut-out, the alpha is kept beside its colours on white: it can mask the loss."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits a channel, which Pillow would clip to 8
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    notes = []
    if profile:
        try:
            image = _through_profile(image, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
            notes = ["has a colour profile that cannot be used; its colours were taken as sRGB"]
    image = image.convert("RGB")
    if alpha and alpha.getextrema() not in ((0, 0), (255, 255)):
        image.putalpha(alpha)
    return image, notes


def _through_profile(image: Image.Image, icc: bytes) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
    srgb = ImageCms.createProfile("sRGB")
    source = image if image.mode == mode else image.convert(mode)
    converted = ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")
    assert converted is not None  # not in place
    converted.info.clear()
    return converted
