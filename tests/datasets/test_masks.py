"""A mask beside a photo says what of it is to be learned."""

import io
from typing import BinaryIO

import pytest
from PIL import Image

from lookalike_datasets import subject_sets
from lookalike_platform.blobs import open_blobs
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import SubjectImage
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.settings import Settings
from support_images import encoded, photo

PHOTOS = [(f"rex{number}.jpg", photo(number)) for number in range(3)]


def mask(width: int, height: int, left: int = 255) -> bytes:
    """Its left half has the value `left`, the other is black."""
    picture = Image.new("L", (width, height))
    picture.paste(left, (0, 0, width // 2, height))
    return encoded(picture, "PNG")


def made(
    database: Database, settings: Settings, extra: list[tuple[str, bytes]]
) -> list[SubjectImage]:
    files: list[tuple[str, BinaryIO]] = [(n, io.BytesIO(data)) for n, data in [*PHOTOS, *extra]]
    blobs = open_blobs(settings)
    found = subject_sets.create(database, blobs, "local", "rex", "dog", files, {}, settings)
    with database.read_session() as session:
        return subject_sets.images(session, found.id)


def kept(settings: Settings, image: SubjectImage) -> Image.Image:
    assert image.sha256 is not None
    return Image.open(open_blobs(settings).path(image.sha256))


@pytest.mark.parametrize("name", ["rex1.mask.png", "rex1-masklabel.png"])
def test_the_mask_is_the_photos_alpha_and_colours_stay(
    database: Database, settings: Settings, name: str
) -> None:
    width, height = Image.open(io.BytesIO(PHOTOS[1][1])).size
    plain = made(database, settings, [])
    images = made(database, settings, [(name, mask(width, height))])
    assert [image.filename for image in images] == [name for name, _ in PHOTOS]
    assert [image.sha256 == other.sha256 for image, other in zip(images, plain, strict=True)] == [
        True,
        False,
        True,
    ]
    masked = kept(settings, images[1])
    assert masked.mode == "RGBA"
    assert masked.getpixel((2, 2))[3] == 255  # type: ignore[index]
    assert masked.getpixel((width - 3, 2))[3] == 0  # type: ignore[index]
    assert masked.convert("RGB").tobytes() == kept(settings, plain[1]).tobytes()


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ([("max.mask.png", mask(96, 96))], "max.mask.png: there is no photo named max"),
        (
            [("rex1.mask.png", mask(96, 96)), ("rex1-masklabel.png", mask(96, 96))],
            "two masks belong to one photo named rex1",
        ),
        ([("rex1.mask.png", mask(400, 96))], "its mask is 400 x 96 pixels"),
        ([("rex1.mask.png", mask(96, 80, left=0))], "its mask is black all over"),
        ([("rex1.mask.png", b"no picture")], "its mask is not a JPEG, PNG or WebP picture"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_and_says_why(
    database: Database, settings: Settings, extra: list[tuple[str, bytes]], complaint: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(database, settings.model_copy(update={"min_images": 3}), extra)
    assert complaint in " ".join(field.message for field in refused.value.fields)
