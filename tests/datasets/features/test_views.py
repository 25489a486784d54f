"""Views of a photo: what is cut out, where it goes, and what of it is to be learned."""

import pytest
from PIL import Image, ImageChops, ImageOps

from lookalike_datasets.features.views import Cut
from support_images import picture


def halves(width: int = 200, height: int = 100) -> Image.Image:
    """Red at the left, blue at the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def test_the_plain_view_is_the_largest_part_of_its_shape_in_the_middle() -> None:
    for size in ((64, 64), (32, 80), (80, 48)):
        found, mask = Cut(*size).show(picture())
        assert found.tobytes() == ImageOps.fit(picture(), size, Image.Resampling.LANCZOS).tobytes()
        assert mask is None


@pytest.mark.parametrize(("x", "colour"), [(0.0, (255, 0, 0)), (1.0, (0, 0, 255))])
def test_a_closer_view_shows_a_smaller_part_at_its_place(x: float, colour: tuple[int, ...]) -> None:
    found, mask = Cut(50, 50, zoom=2, x=x, y=0.5).show(halves())
    assert found.size == (50, 50)
    assert {found.getpixel((0, 0)), found.getpixel((49, 49))} == {colour}
    assert mask is None


def test_a_closer_view_is_that_part_of_the_photo_resized() -> None:
    found, _ = Cut(40, 40, zoom=1.6, x=0.25, y=0.75).show(picture(size=(96, 80)))
    side = 80 / 1.6
    left, top = (96 - side) * 0.25, (80 - side) * 0.75
    box = (left, top, left + side, top + side)
    expected = picture(size=(96, 80)).resize((40, 40), Image.Resampling.LANCZOS, box=box)
    assert found.tobytes() == expected.tobytes()


def test_a_view_from_afar_lies_on_a_neutral_canvas_and_only_it_is_learned() -> None:
    found, mask = Cut(40, 40, zoom=0.5, x=1.0, y=0.0).show(picture())
    whole, _ = Cut(20, 20).show(picture())
    assert found.crop((20, 0, 40, 20)).tobytes() == whole.tobytes()
    assert found.getpixel((10, 10)) == found.getpixel((30, 30)) == (128, 128, 128)
    assert mask is not None
    assert mask.getbbox() == (20, 0, 40, 20)
    assert set(mask.tobytes()) == {0, 255}


def test_what_is_transparent_is_masked_where_that_is_asked_for() -> None:
    photo = halves().convert("RGBA")
    photo.paste((0, 0, 0, 0), (0, 0, 100, 100))
    assert Cut(20, 10).show(photo)[1] is None
    _, mask = Cut(20, 10, masked=True).show(photo)
    assert mask is not None
    assert (mask.getpixel((2, 5)), mask.getpixel((17, 5))) == (0, 255)
    _, mirrored = Cut(20, 10, masked=True, mirrored=True).show(photo)
    assert mirrored is not None
    assert (mirrored.getpixel((2, 5)), mirrored.getpixel((17, 5))) == (255, 0)
    assert Cut(20, 10, masked=True).show(halves())[1] is None


def test_a_mirrored_view_is_the_mirror_image_of_the_plain_one() -> None:
    plain, _ = Cut(32, 32, zoom=1.2, x=0.1).show(picture())
    found, _ = Cut(32, 32, zoom=1.2, x=0.1, mirrored=True).show(picture())
    assert found.tobytes() == ImageOps.mirror(plain).tobytes()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(96, 80), (60, 130), (40, 30)])
def test_sdxl_is_told_where_in_the_resized_photo_the_view_lies(
    size: tuple[int, int], mirrored: bool
) -> None:
    down = Image.linear_gradient("L")
    photo = Image.merge("RGB", (down.rotate(90), down, down)).resize(size)
    for cut in (Cut(48, 32, mirrored=mirrored), Cut(32, 40, 1.4, 0.2, 0.9, mirrored=mirrored)):
        height, width, top, left, high, wide = cut.time_ids(*size)
        assert (width, height, wide, high) == (*size, cut.width, cut.height)
        # As trainers that resize and then cut do it, by those numbers alone.
        scale = cut.zoom * max(cut.width / width, cut.height / height)
        resized = photo.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS
        )
        if mirrored:
            resized = ImageOps.mirror(resized)
        expected = resized.crop((left, top, left + wide, top + high))
        found, _ = cut.show(photo)
        furthest = [high for _, high in ImageChops.difference(found, expected).getextrema()]
        assert max(furthest) <= 5  # of 255, across the photo: less than a pixel


def test_sdxl_is_told_that_a_reduced_photo_is_whole_on_its_canvas() -> None:
    assert Cut(48, 32, zoom=0.5, x=1.0).time_ids(300, 200) == (32, 48, 0, 0, 32, 48)
