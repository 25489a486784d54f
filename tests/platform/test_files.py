from pathlib import Path

import pytest

from lookalike_platform.files import atomic_write, canonical_digest, sha256_bytes, sha256_file


def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a/b.txt", "grün")
    assert (tmp_path / "a/b.txt").read_bytes() == "grün".encode()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with pytest.raises(TypeError):
        atomic_write(path, 3)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_of_a_file_and_of_its_bytes_agree(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"abc") == expected


def test_the_canonical_digest_ignores_the_order_of_keys_only() -> None:
    assert canonical_digest({"a": 1, "b": [1, 2]}) == canonical_digest({"b": [1, 2], "a": 1})
    assert canonical_digest({"a": [1, 2]}) != canonical_digest({"a": [2, 1]})
