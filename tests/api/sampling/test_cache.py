"""What the cache promises, whatever is asked of it and however slowly things load."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike_api.sampling.cache import Cache, Kept
from lookalike_platform.errors import InvalidRequest

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
BUDGET = 6


def make(load: Any, workers: int = 4) -> Cache[str, str, str]:
    return Cache("cache", BUDGET, SIZES.__getitem__, load, ThreadPoolExecutor(workers))


def take(cache: Cache[str, str, str], key: str) -> Kept[str] | None:
    taken = cache.take([(key, key)])
    return taken[0] if taken else None


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=40))
def test_the_budget_is_kept_and_what_is_pinned_stays_the_same(
    actions: list[tuple[str, bool]],
) -> None:
    loads: list[str] = []
    cache = make(lambda key: loads.append(key) or object())
    taken: list[tuple[str, Kept[Any], Any]] = []
    for key, give_back in actions:
        if give_back and taken:
            cache.give_back(taken.pop(0)[1])
        elif (kept := take(cache, key)) is not None:
            taken.append((key, kept, kept.value.result()))
        else:
            others = {other for other, _, _ in taken} - {key}
            assert sum(SIZES[other] for other in others) + SIZES[key] > BUDGET
        assert cache.held <= BUDGET
        assert set(cache.pinned) == {key for key, _, _ in taken}
        for key, _, value in taken:
            again = take(cache, key)
            assert again is not None
            assert again.value.result() is value
            cache.give_back(again)
    assert cache.counts.loads == len(loads)
    assert cache.counts.evictions == len(loads) - len(cache._kept)


def test_a_value_is_loaded_once_however_many_take_it_meanwhile() -> None:
    gate, loads = threading.Event(), []

    def load(key: str) -> str:
        loads.append(key)
        gate.wait()
        return key

    cache = make(load)
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: take(cache, "a"), range(32)))
        gate.set()
        assert {kept.value.result() for kept in taken if kept} == {"a"}
    assert loads == ["a"]
    assert (cache.counts.loads, cache.counts.hits) == (1, 31)


def test_the_one_unused_for_longest_makes_room() -> None:
    cache = make(str)
    for key in ("a", "b", "c", "a", "d"):
        kept = take(cache, key)
        assert kept is not None
        kept.value.result()
        cache.give_back(kept)
    assert list(cache._kept) == ["a", "d"]


class Loaded:
    """Something that can be watched."""


def test_what_made_room_is_freed_at_once_and_not_when_cycles_are_collected() -> None:
    gate = threading.Event()
    cache = make(lambda key: gate.wait() and Loaded(), workers=1)
    gc.disable()
    try:
        kept = take(cache, "d")
        gate.set()
        assert kept is not None
        loaded = weakref.ref[Any](kept.value.result())
        cache.loaders.submit(str).result()  # the loading thread has let it go
        cache.give_back(kept)
        del kept
        assert loaded() is not None
        assert take(cache, "e") is not None
        assert loaded() is None
    finally:
        gc.enable()


def test_what_could_not_be_loaded_is_tried_again_and_pins_nothing() -> None:
    tries: list[str] = []

    def load(key: str) -> str:
        tries.append(key)
        if len(tries) == 1:
            raise OSError("away")
        return key

    cache = make(load, workers=1)
    first = take(cache, "e")
    assert first is not None
    with pytest.raises(OSError, match="away"):
        first.value.result()
    cache.loaders.submit(str).result()  # its callbacks have been called
    assert (cache.held, cache.pinned, cache.counts.failures) == (0, [], 1)
    second = take(cache, "e")
    cache.give_back(first)  # late, and of no account
    assert second is not None
    assert second.value.result() == "e"
    assert cache.pinned == ["e"]


def test_a_value_being_loaded_is_not_thrown_out_for_another() -> None:
    gate = threading.Event()
    cache = make(lambda key: gate.wait() and key)
    kept = take(cache, "d")
    assert kept is not None
    cache.give_back(kept)  # canceled meanwhile
    assert take(cache, "c") is None
    gate.set()
    kept.value.result()
    assert take(cache, "c") is not None


def test_what_can_never_be_there_together_is_refused() -> None:
    cache = Cache("host's cache", 4, SIZES.__getitem__, str, ThreadPoolExecutor(1))
    cache.check({"d": "d"})
    for names in ("e", "bc"):
        with pytest.raises(InvalidRequest, match="room for 4"):
            cache.check({name: name for name in names})


def test_all_that_is_asked_for_is_pinned_or_nothing_and_hits_count_once() -> None:
    cache = make(str)
    held = take(cache, "d")
    assert held is not None
    together = [(key, key) for key in ("a", "c", "a")]
    for _ in range(3):
        assert cache.take(together) is None
        assert cache.pinned == ["d"]
    cache.give_back(held)
    assert (cache.counts.loads, cache.counts.hits) == (1, 0)
    taken = cache.take(together)
    assert taken is not None
    assert [kept.value.result() for kept in taken] == ["a", "c", "a"]
    assert (cache.counts.loads, cache.counts.hits) == (3, 1)
    for kept in taken:
        cache.give_back(kept)
    assert cache.pinned == []


def test_who_cannot_come_in_yet_drives_nobody_out() -> None:
    cache = make(str)
    for key in ("a", "b"):
        kept = take(cache, key)
        assert kept is not None
        kept.value.result()
        if key == "a":
            cache.give_back(kept)
    assert cache.take([("a", "a"), ("d", "d")]) is None  # b is in use, and they are too large
    assert list(cache._kept) == ["a", "b"]
    assert (cache.counts.loads, cache.counts.evictions) == (2, 0)
