"""Adapters that the whole base wears: their files are looked through once, and ahead."""

import threading
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lookalike_api.sampling.engine import STRETCH
from lookalike_api.sampling.messages import AdapterFile, Region
from lookalike_platform.files import sha256_file
from lookalike_registry import check, spectra
from lookalike_trainers.methods import svdiff
from support_methods import CARD, trained
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, save_adapter

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


def apart(one: Any, other: Any) -> int:
    """The largest difference, in 255ths."""
    return int(abs(numpy.stack(one).astype(int) - numpy.stack(other).astype(int)).max())


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


def test_a_file_that_is_gone_leaves_nothing_pinned_beside_it(
    base_folder: Path, files: list[AdapterFile], tmp_path: Path
) -> None:
    """The next adapter has room, in a budget for one."""
    rows = []
    for seed in range(2):
        path = tmp_path / f"rows-{seed}.safetensors"
        rows.append(AdapterFile(f"rows-{seed}@1", save_adapter(path, base_folder, seed), path, 1.0))
    roomy = engine_of(base_folder)
    roomy.paint(adapters=rows[:1])
    engine = engine_of(base_folder, adapter_bytes=roomy.engine.adapters.host.held)
    pair = (rows[0], files[0])
    engine.paint(adapters=pair)
    files[0].path.unlink()
    (end,) = engine.until(engine.send(adapters=pair))
    assert end["problem"]["detail"] == "dreambooth@1: its file is gone."
    assert engine.engine.adapters.host.pinned == []
    engine.paint(adapters=(rows[1],))


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


def changes_of(engine: Orders) -> list[tuple[str, ...]]:
    """What the base put on, one after the other, from now on."""
    (base,) = engine.engine._bases._bases.values()
    changes: list[tuple[str, ...]] = []
    wear = base.wear

    def seen(worn: Any) -> None:
        if tuple(worn) != base.worn:
            changes.append(tuple(file.ref for file in worn))
        wear(worn)

    base.wear = seen  # type: ignore[method-assign]
    return changes


@pytest.mark.parametrize("last", ["whole", "nothing"])
def test_an_order_whose_regions_change_the_base_in_each_step_has_stretches_like_any(
    engine: Orders, files: list[AdapterFile], last: str
) -> None:
    """It does not make others wait for its changes between any two steps of theirs."""
    engine.paint()
    changes = changes_of(engine)
    worn = (files[1],) if last == "whole" else ()
    regions = (Region("a", files[:1], LEFT), Region("b", worn, RIGHT))
    both = engine.send(regions=regions, compose="latents", steps=30), engine.send(steps=30)
    assert [end["type"] for end in engine.until(*both)] == ["done", "done"]
    order = [told["number"] for told in engine.told if told["type"] == "progress"]
    turns = [[*same] for _, same in groupby(order)]
    assert len(turns) <= 5
    assert max(map(len, turns)) <= STRETCH
    assert changes  # the base did change


def test_regions_in_the_latents_are_asked_about_in_as_many_calls_as_their_pixels_need(
    base_folder: Path,
) -> None:
    regions = tuple(Region("a", (), (x / 4, 0.0, (x + 1) / 4, 1.0)) for x in range(4))
    small, large = (engine_of(base_folder, batch_pixels=n * 64 * 64) for n in (2, 8))
    painted = []
    for engine, rows in ((small, [4, 4]), (large, [8])):
        engine.paint()
        (base,) = engine.engine._bases._bases.values()
        called: list[int] = []
        base.unet.register_forward_pre_hook(lambda _, args, seen=called: seen.append(len(args[0])))
        painted.append(engine.paint(regions=regions, compose="latents", steps=1))
        assert called == rows
    assert apart(*painted) <= 1


def test_a_dora_is_for_the_whole_base_from_the_first_look_at_its_file(
    engine: Orders, base_folder: Path, tmp_path: Path, read: Counter[Path]
) -> None:
    """Its header says so: nothing of it fills the cache, or is refused for it."""
    path = tmp_path / "dora.safetensors"
    dora = AdapterFile("dora@1", save_adapter(path, base_folder, dora=True), path, 1.0)
    narrow = engine_of(base_folder, adapter_bytes=1)
    narrow.paint(adapters=(dora,))
    assert narrow.engine.adapters.host.counts.loads == 0
    assert read == {path: 1}


def test_a_file_that_nobody_waits_for_any_more_is_not_looked_through(
    engine: Orders, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, seen = threading.Event(), []

    def slow(path: Path) -> Any:
        seen.append(path)
        assert opened.wait(20)
        return sha256_file(path)

    monkeypatch.setattr(check, "sha256_file", slow)
    first, second = (engine.send(adapters=(file,)) for file in files)
    engine.engine.turn()
    engine.engine.cancel(second)
    opened.set()
    assert [end["type"] for end in engine.until(first, second)] == ["done", "canceled"]
    assert seen == [files[0].path]


def test_what_takes_long_to_compute_of_the_base_is_computed_beside_other_work(
    engine: Orders, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVDiff's decompositions: of a large base they take minutes."""
    threads: Counter[str] = Counter()
    decomposed = spectra._svd

    def seen(matrix: Any) -> Any:
        threads[threading.current_thread().name.partition("_")[0]] += 1
        return decomposed(matrix)

    monkeypatch.setattr(spectra, "_svd", seen)
    engine.paint(adapters=files[1:])
    assert threads.keys() == {"preparer"}


def test_modules_of_other_orders_are_whole_while_something_is_computed_of_a_base(
    base_folder: Path, files: list[AdapterFile], tmp_path: Path
) -> None:
    """To build a model patches all of torch for a moment: others' parameters come out on "meta"."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            svdiff.prepare(base_folder, tmp_path, files[1].path)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        rows = [torch.nn.Embedding(2, 3).weight for _ in range(5000)]
    finally:
        stop.set()
        worker.join()
    assert {row.device.type for row in rows} == {"cpu"}


def test_others_do_not_wait_for_what_is_computed_of_a_base_for_one(
    engine: Orders, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, decomposed = threading.Event(), spectra._svd

    def slow(matrix: Any) -> Any:
        assert opened.wait(20)
        return decomposed(matrix)

    monkeypatch.setattr(spectra, "_svd", slow)
    waits, goes = engine.send(adapters=files[1:]), engine.send(adapters=files[:1])
    (end,) = engine.until(goes)
    assert end["type"] == "done"
    assert {told["number"] for told in engine.told} == {goes}
    assert engine.engine.adapters.preparing
    opened.set()
    (end,) = engine.until(waits)
    assert end["type"] == "done"
    assert not engine.engine.adapters.preparing
