"""Orders that wait for room in memory: who comes in when, and what those who wait are told."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lookalike_api.sampling import entrance, messages, models
from lookalike_api.sampling.messages import AdapterFile
from lookalike_registry import check
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, save_adapter

pytestmark = LIBRARY_WARNINGS


@pytest.fixture(scope="module")
def files(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    """Adapters of one size."""
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for number, name in enumerate("abcd"):
        path = folder / f"{name}.safetensors"
        digest = save_adapter(path, base_folder, number)
        made.append(AdapterFile(f"{name}@1", digest, path, 1.0))
    return made


@pytest.fixture(scope="module")
def size(base_folder: Path, files: list[AdapterFile]) -> int:
    """Bytes of one of them in memory."""
    roomy = engine_of(base_folder)
    roomy.paint(adapters=(files[0],))
    return roomy.engine.adapters.host.held


@pytest.fixture
def narrow(base_folder: Path, size: int) -> Callable[[int], Orders]:
    """An engine with room for so many of them."""
    return lambda adapters: engine_of(base_folder, adapters * size)


def damaged(file: AdapterFile, folder: Path) -> AdapterFile:
    data = bytearray(file.path.read_bytes())
    data[-2] ^= 1
    path = folder / "damaged.safetensors"
    path.write_bytes(data)
    return AdapterFile("damaged@1", file.digest, path, 1.0)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Damaged files are read when it opens."""
    opened = threading.Event()
    digest = check.sha256_file

    def read(path: Path) -> Any:
        assert "damaged" not in path.name or opened.wait(20)
        return digest(path)

    monkeypatch.setattr(check, "sha256_file", read)
    return opened


def test_who_waits_for_room_comes_in_when_one_before_could_not_be_loaded(
    narrow: Callable[[int], Orders],
    files: list[AdapterFile],
    tmp_path: Path,
    gate: threading.Event,
) -> None:
    engine = narrow(2)
    a, b, c, d = files
    refused = engine.send(adapters=(a, damaged(b, tmp_path)))
    waits = engine.send(adapters=(c, d))
    engine.engine.turn()  # a is there, and there is no room for c and d
    gate.set()
    ends = engine.until(refused, waits)
    assert [end["type"] for end in ends] == ["error", "done"]


def test_a_third_base_loads_when_the_one_it_replaces_has_left_memory(
    base_folder: Path, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: weakref.WeakSet[Any] = weakref.WeakSet()
    before: list[int] = []

    class Watched(models.ResidentBase):
        def __init__(self, *told: Any) -> None:
            before.append(len(bases))
            bases.add(self)
            super().__init__(*told)

    monkeypatch.setattr(models, "ResidentBase", Watched)
    engine = engine_of(base_folder)
    gc.disable()
    try:
        engine.until(engine.send(base_fingerprint="1", adapters=files[:1]))
        first = engine.send(base_fingerprint="1")
        others = [engine.send(base_fingerprint=name, steps=8) for name in "23"]
        engine.until(first, *others)
    finally:
        gc.enable()
    assert before == [0, 1, 1]


def test_who_shares_a_file_that_cannot_be_loaded_is_told_of_its_own_name_alone(
    narrow: Callable[[int], Orders],
    files: list[AdapterFile],
    tmp_path: Path,
    gate: threading.Event,
) -> None:
    engine = narrow(1)
    theirs = damaged(files[0], tmp_path)
    mine = replace(theirs, ref="mine@2")
    numbers = [engine.send(adapters=(file,)) for file in (theirs, mine)]
    engine.engine.turn()
    gate.set()
    told = [end["problem"]["detail"] for end in engine.until(*numbers)]
    assert [detail.partition(":")[0] for detail in told] == ["damaged@1", "mine@2"]
    assert not any("damaged@1" in detail for detail in told[1:])
    assert engine.engine.adapters.host.counts.loads == 1


def test_a_deadline_that_passes_is_told_at_the_next_turn_wherever_the_order_waits(
    base_folder: Path,
    size: int,
    files: list[AdapterFile],
    tmp_path: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(base_folder, 3 * size, batch_pixels=64 * 64)
    a, b, *others = files
    deadline = time.time() + 3600
    begun = engine.send(adapters=(a,), steps=12, deadline=deadline)
    while not any(told["type"] == "progress" for told in engine.told):
        engine.engine.turn()
        engine.collect()
    in_a_group = engine.send(adapters=(a,), deadline=deadline)
    loading = engine.send(adapters=(damaged(b, tmp_path),), deadline=deadline)
    for_room = engine.send(adapters=tuple(others), deadline=deadline)
    engine.engine.turn()
    monkeypatch.setattr(messages, "time", SimpleNamespace(time=lambda: deadline + 1))
    engine.engine.turn()
    engine.collect()
    late = [told for told in engine.told if told["type"] == "error"]
    assert {told["number"] for told in late} == {in_a_group, loading, for_room}
    assert {"deadline" in told["problem"]["detail"] for told in late} == {True}
    assert engine.engine.adapters.host.pinned == [(a.digest, str(engine.base))]
    gate.set()
    (end,) = engine.until(begun)
    assert end["type"] == "done"


def busy_with(engine: Orders, file: AdapterFile) -> int:
    """A long order, in its first steps."""
    long = engine.send(adapters=(file,), steps=60)
    while not any(told["number"] == long for told in engine.told):
        engine.engine.turn()
        engine.collect()
    return long


def test_who_needs_only_what_is_there_passes_who_waits_for_room_and_evicts_nothing(
    narrow: Callable[[int], Orders], files: list[AdapterFile]
) -> None:
    engine = narrow(3)
    a, b, c, d = files
    engine.paint(adapters=(b,))
    long = busy_with(engine, a)
    head = engine.send(adapters=(b, c, d))
    waits_too = engine.send(adapters=(c,))
    with_one_that_is_there = engine.send(adapters=(b,))
    bare = engine.send()
    other_base = engine.send(base_fingerprint="other")
    engine.until(with_one_that_is_there, bare)
    ended = {told["number"] for told in engine.told if told["type"] == "done"}
    assert not ended & {long, head, waits_too, other_base}
    assert engine.engine.adapters.host.counts.evictions == 0
    assert engine.engine.adapters.host.pinned == [(a.digest, str(engine.base))]
    engine.until(long, head, waits_too, other_base)
    assert engine.engine.adapters.host.pinned == []


def test_who_waits_for_room_is_passed_so_often_and_no_more(
    narrow: Callable[[int], Orders], files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrance, "PASSES", 2)
    engine = narrow(3)
    a, *others = files
    busy_with(engine, a)
    head = engine.send(adapters=tuple(others))
    passing = [engine.send(adapters=(a,)) for _ in range(4)]
    engine.until(head, *passing)
    begun = [told["number"] for told in engine.told if told["type"] == "begun"]
    assert begun[1:] == [*passing[:2], head, *passing[2:]]
