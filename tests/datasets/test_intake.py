import io

import pytest
from PIL import Image, ImageChops, ImageCms, ImageFilter, PngImagePlugin

from lookalike_datasets.intake import difference_hash, examine, is_blurry, looks_alike
from lookalike_platform.settings import Settings
from support_images import encoded, photo, picture, png_header

LIMITS = Settings()


def judge(data: bytes, name: str = "a.jpg", limits: Settings = LIMITS) -> tuple[bool, str | None]:
    verdict = examine(name, io.BytesIO(data), limits)
    return verdict.accepted, verdict.reason


def pixels(data: bytes) -> Image.Image:
    verdict = examine("a", io.BytesIO(data), LIMITS)
    assert verdict.accepted, verdict.reason
    image = Image.open(io.BytesIO(verdict.png))
    assert (image.mode, image.format, image.size) == ("RGB", "PNG", (verdict.width, verdict.height))
    return image


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_a_lossless_picture_keeps_its_pixels(options: dict[str, object]) -> None:
    data = encoded(picture(), **options)  # type: ignore[arg-type]
    assert pixels(data).tobytes() == picture().tobytes()


def test_a_jpeg_is_accepted_without_warnings() -> None:
    verdict = examine("a.jpg", io.BytesIO(photo()), LIMITS)
    assert (verdict.accepted, verdict.warnings) == (True, [])


def test_the_orientation_of_the_camera_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to look at it
    upright = pixels(encoded(picture(), "PNG", exif=exif))
    assert upright.tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_metadata_and_places_are_dropped() -> None:
    exif = Image.Exif()
    exif[0x010F] = "SECRETCAMERA"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 30.0)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRETCOMMENT")
    for data in (
        encoded(picture(), exif=exif, xmp=b"SECRETXMP", comment=b"SECRETCOMMENT"),
        encoded(picture(), "PNG", exif=exif, pnginfo=text),
        encoded(picture(), "WEBP", exif=exif, xmp=b"SECRETXMP"),
    ):
        assert b"SECRET" in data
        verdict = examine("a", io.BytesIO(data), LIMITS)
        assert b"SECRET" not in verdict.png
        kept = Image.open(io.BytesIO(verdict.png))
        assert kept.info == {}
        assert not kept.getexif()


def test_bytes_after_the_picture_are_dropped() -> None:
    verdict = examine("a.jpg", io.BytesIO(photo() + b"PK\x03\x04<script>"), LIMITS)
    assert verdict.accepted
    assert b"<script>" not in verdict.png


def test_transparent_parts_become_white() -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert pixels(encoded(image, "PNG")).getextrema() == ((255, 255),) * 3
    palette = picture().quantize(16)
    palette.info["transparency"] = bytes(16)
    assert pixels(encoded(palette, "PNG")).getextrema() == ((255, 255),) * 3


def test_a_cut_out_keeps_its_alpha_and_nothing_of_what_it_hid() -> None:
    image = picture().convert("RGBA")
    image.paste((1, 2, 3, 0), (0, 0, 48, 80))
    kept = Image.open(io.BytesIO(examine("a", io.BytesIO(encoded(image, "PNG")), LIMITS).png))
    assert kept.mode == "RGBA"
    assert kept.getpixel((10, 10)) == (255, 255, 255, 0)
    shown = (48, 0, 96, 80)
    assert kept.crop(shown).getchannel("A").getextrema() == (255, 255)
    assert list(kept.crop(shown).convert("RGB").tobytes()) == list(picture().crop(shown).tobytes())


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    gray = Image.new("I;16", (80, 80), 128 * 256)
    assert pixels(encoded(gray, "PNG")).getextrema() == ((128, 128),) * 3


def test_cmyk_becomes_rgb() -> None:
    assert pixels(encoded(picture().convert("CMYK"))).mode == "RGB"


def test_a_colour_profile_is_applied() -> None:
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = pixels(encoded(picture(), "PNG", icc_profile=lab_like))
    assert max(high for _, high in _difference(same, picture())) <= 1
    gray = picture().convert("L")
    assert pixels(encoded(gray, "PNG", icc_profile=lab_like)).size == gray.size


def _difference(one: Image.Image, other: Image.Image) -> tuple[tuple[int, int], ...]:
    return ImageChops.difference(one, other).getextrema()  # type: ignore[return-value]


def test_a_broken_colour_profile_is_a_warning() -> None:
    verdict = examine("a", io.BytesIO(encoded(picture(), "PNG", icc_profile=b"junk")), LIMITS)
    assert verdict.accepted
    assert "colour profile" in verdict.warnings[0]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format: str) -> None:
    data = encoded(picture(0), format, save_all=True, append_images=[picture(1), picture(2)])
    assert judge(data) == (False, "is animated; upload one still picture")


def test_a_phones_jpeg_with_a_second_picture_inside_is_accepted() -> None:
    data = encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)], quality=95)
    assert judge(data) == (True, None)


@pytest.mark.parametrize(
    "data",
    [
        b"just text in a file named .jpg",
        b"\xff\xd8\xff",
        encoded(picture(), "GIF"),
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_what_is_no_picture_of_an_allowed_format_is_refused(data: bytes) -> None:
    accepted, reason = judge(data)
    assert not accepted
    assert reason == "is not a JPEG, PNG or WebP picture"


def test_a_heic_file_gets_a_hint() -> None:
    assert "export it as JPEG" in str(judge(b"\0\0\0\x18ftypheic" + bytes(40))[1])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_refused(format: str) -> None:
    data = encoded(picture(size=(300, 300)), format)
    accepted, reason = judge(data[: len(data) * 2 // 3])
    assert not accepted
    assert "damaged" in str(reason) or "is not a" in str(reason)


def test_a_corrupt_picture_is_refused() -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[60:90] = bytes(30)
    assert judge(bytes(data))[0] is False


def test_an_empty_file_is_refused() -> None:
    assert judge(b"") == (False, "is empty")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((30_000, 200), "is 30000 x 200 pixels; the longer side may have 8192"),
        ((30_000, 30_000), "has too many pixels"),
        ((10_000, 10_000), "has too many pixels"),
        ((500, 63), "is too small: 500 x 63 pixels, and the shorter side needs 64"),
    ],
)
def test_dimensions_are_judged_by_the_header_before_any_pixel_is_decoded(
    size: tuple[int, int], reason: str
) -> None:
    assert judge(png_header(*size)) == (False, reason)


def test_a_file_is_not_read_beyond_its_cap() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            assert size >= 0
            self.given += size
            return bytes(size)

    endless = Endless()
    verdict = examine("a.jpg", endless, LIMITS)  # type: ignore[arg-type]
    assert verdict.reason == "is larger than 20 MiB"
    assert endless.given == LIMITS.max_image_bytes + 1


def test_a_blurry_photo_is_accepted_with_a_warning() -> None:
    blurred = picture(size=(400, 400)).filter(ImageFilter.GaussianBlur(8))
    assert is_blurry(blurred)
    assert not is_blurry(picture(size=(400, 400)))
    verdict = examine("a.png", io.BytesIO(encoded(blurred, "PNG")), LIMITS)
    assert verdict.accepted
    assert verdict.warnings == ["looks blurry: a sharper photo teaches more"]


def test_a_scaled_and_recompressed_copy_looks_alike_and_another_picture_does_not() -> None:
    original = picture(size=(400, 400))
    copy = Image.open(io.BytesIO(encoded(original.resize((150, 150)), quality=40)))
    assert looks_alike(difference_hash(original), difference_hash(copy))
    assert not looks_alike(difference_hash(original), difference_hash(picture(1, (400, 400))))
