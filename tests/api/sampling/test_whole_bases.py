"""Adapters that the whole base wears: their files are looked through once, and ahead."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lookalike_api.sampling.messages import AdapterFile, Region
from lookalike_platform.files import sha256_file
from lookalike_registry import check
from support_methods import CARD, trained
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of

pytestmark = LIBRARY_WARNINGS

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def engine(base_folder: Path) -> Orders:
    return engine_of(base_folder)


@pytest.fixture
def files(base_folder: Path, tmp_path: Path) -> list[AdapterFile]:
    """A DreamBooth and an SVDiff."""
    made = []
    for name in ("dreambooth", "svdiff"):
        method, _ = trained(base_folder, name)
        (tmp_path / name).mkdir()
        path = method.save(tmp_path / name, CARD)
        made.append(AdapterFile(f"{name}@1", sha256_file(path), path, 1.0))
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file has been read through."""
    counts: Counter[Path] = Counter()

    def counted(path: Path) -> str:
        counts[path] += 1
        return sha256_file(path)

    monkeypatch.setattr(check, "sha256_file", counted)
    return counts


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_a_file_is_looked_through_once_however_often_the_base_puts_it_on(
    engine: Orders, files: list[AdapterFile], read: Counter[Path]
) -> None:
    one, other = files
    regions = (Region("a", (one,), LEFT), Region("b", (other,), RIGHT))
    engine.paint(regions=regions, compose="latents", steps=5)
    engine.paint(adapters=(one,))
    assert read == {one.path: 1, other.path: 1}


def test_a_file_that_has_changed_since_is_refused_by_name(
    engine: Orders, files: list[AdapterFile], read: Counter[Path]
) -> None:
    one, other = files
    engine.paint(adapters=(one,))
    engine.paint()
    flip(one.path)
    bad, good = engine.until(engine.send(adapters=(one,)), engine.send(adapters=(other,)))
    assert bad["problem"]["detail"].startswith(f"{one.ref}: The file is damaged")
    assert good["type"] == "done"
    assert read[one.path] == 2


def test_a_file_is_looked_through_while_others_are_painted(
    engine: Orders, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def slow(path: Path) -> Any:
        assert opened.wait(20)
        return sha256_file(path)

    monkeypatch.setattr(check, "sha256_file", slow)
    waits, goes = engine.send(adapters=files[:1]), engine.send()
    (end,) = engine.until(goes)
    assert end["type"] == "done"
    assert {told["number"] for told in engine.told} == {goes}
    opened.set()
    (end,) = engine.until(waits)
    assert end["type"] == "done"
