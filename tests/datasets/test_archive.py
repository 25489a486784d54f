import io
import random
import stat
import struct
import zipfile

import pytest

from lookalike_datasets.archive import MAX_ENTRIES, read_zip
from lookalike_platform.errors import InvalidRequest, TooLarge
from lookalike_platform.settings import Settings
from support_images import photo, zipped

LIMITS = Settings(max_image_bytes=100_000, max_upload_bytes=150_000)


def names(file: io.BytesIO) -> list[str]:
    return [name for name, _ in read_zip(file, LIMITS).files]


def test_photos_come_in_the_order_of_the_archive_with_their_bytes() -> None:
    archive = read_zip(zipped({"b.jpg": photo(1), "a.jpg": photo(2)}), LIMITS)
    assert [(name, file.read()) for name, file in archive.files] == [
        ("b.jpg", photo(1)),
        ("a.jpg", photo(2)),
    ]


def test_a_text_beside_an_image_is_its_caption() -> None:
    entries = {
        "in/a.jpg": photo(),
        "in/a.txt": b"\xef\xbb\xbfa caf\xc3\xa9 cup\n",
        "b.jpg": photo(1),
    }
    archive = read_zip(zipped(entries), LIMITS)
    assert archive.captions == {"in/a.jpg": "a café cup"}
    assert [name for name, _ in archive.files] == ["in/a.jpg", "b.jpg"]


def test_a_text_without_an_image_is_left_for_the_intake_to_refuse() -> None:
    assert names(zipped({"a.jpg": photo(), "notes.txt": b"hello"})) == ["a.jpg", "notes.txt"]


def test_what_macos_adds_is_left_out() -> None:
    entries = {"a.jpg": photo(), "__MACOSX/._a.jpg": b"x", ".DS_Store": b"x", "d/.hidden": b"x"}
    assert names(zipped(entries)) == ["a.jpg"]


@pytest.mark.parametrize(
    "name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "..\\a.jpg", "C:\\a.jpg", "C:/a.jpg"]
)
def test_a_path_that_leaves_the_archive_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="points outside the archive"):
        read_zip(zipped({"ok.jpg": photo(), name: photo(1)}), LIMITS)


def test_a_symbolic_link_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("a.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InvalidRequest, match="is a link"):
        read_zip(buffer, LIMITS)


def test_a_name_that_occurs_twice_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", photo())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.jpg", photo(1))
    with pytest.raises(InvalidRequest, match="occurs twice"):
        read_zip(buffer, LIMITS)


@pytest.mark.parametrize("name", ["more.zip", "photos.tar", "photo.jpg"])
def test_an_archive_inside_the_archive_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is an archive inside the archive"):
        read_zip(zipped({name: zipped({"a.jpg": photo()}).getvalue()}), LIMITS)


def test_a_bomb_is_refused_by_its_ratio() -> None:
    limits = Settings()
    with pytest.raises(InvalidRequest, match="inflates more than 100 times"):
        read_zip(zipped({"a.png": bytes(8 * 2**20)}), limits)


def test_a_bomb_that_lies_about_its_size_is_refused() -> None:
    bomb = bytearray(zipped({"a.png": bytes(2**20)}).getvalue())
    directory = bomb.rindex(b"PK\x01\x02")
    struct.pack_into("<I", bomb, directory + 24, 100)  # uncompressed size
    with pytest.raises(InvalidRequest, match="damaged"):
        read_zip(io.BytesIO(bomb), LIMITS)


def test_an_entry_above_its_cap_is_refused() -> None:
    with pytest.raises(TooLarge, match=r"a\.png in the zip is too large"):
        read_zip(zipped({"a.png": bytes(100_001)}, zipfile.ZIP_STORED), LIMITS)


def test_all_entries_together_are_capped() -> None:
    with pytest.raises(TooLarge, match=r"b\.png"):
        read_zip(zipped({"a.png": bytes(90_000), "b.png": bytes(90_000)}), LIMITS)


def test_too_many_entries_are_refused_before_they_are_read() -> None:
    with pytest.raises(TooLarge, match=f"at most {MAX_ENTRIES}"):
        read_zip(zipped({f"{n}.jpg": b"" for n in range(MAX_ENTRIES + 1)}), LIMITS)


def test_an_encrypted_entry_is_refused() -> None:
    data = bytearray(zipped({"a.jpg": photo()}).getvalue())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InvalidRequest, match="is encrypted"):
        read_zip(io.BytesIO(data), LIMITS)


def test_an_unusual_compression_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="compressed in an unusual way"):
        read_zip(zipped({"a.jpg": photo()}, zipfile.ZIP_LZMA), LIMITS)


@pytest.mark.parametrize(
    "data", [b"", b"not a zip", photo(), b"PK\x05\x06", b"PK\x05\x06" + b"\xff" * 18]
)
def test_what_is_not_a_zip_is_refused(data: bytes) -> None:
    with pytest.raises((InvalidRequest, TooLarge)):
        read_zip(io.BytesIO(data), LIMITS)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_truncated_zip_is_refused(cut: int) -> None:
    data = zipped({"a.jpg": photo()}).getvalue()
    with pytest.raises(InvalidRequest):
        read_zip(io.BytesIO(data[:-cut]), LIMITS)


def test_changed_content_is_found_by_its_checksum() -> None:
    data = bytearray(zipped({"a.jpg": photo()}, zipfile.ZIP_STORED).getvalue())
    data[300] ^= 0xFF
    with pytest.raises(InvalidRequest, match="damaged"):
        read_zip(io.BytesIO(data), LIMITS)


def test_a_caption_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not a caption in UTF-8"):
        read_zip(zipped({"a.jpg": photo(), "a.txt": b"\xff\xfe\x00"}), LIMITS)


def test_damage_anywhere_is_read_or_refused_and_nothing_else() -> None:
    sound = zipped({"a.jpg": b"x" * 300, "a.txt": b"caption", "b/c.png": bytes(100)}).getvalue()
    generator = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(sound)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(sound))] = generator.randrange(256)
        try:
            read_zip(io.BytesIO(damaged), LIMITS)
        except (InvalidRequest, TooLarge):
            refused += 1
    assert refused > 1000
