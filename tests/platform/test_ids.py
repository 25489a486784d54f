import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lookalike_platform.ids import new_id


def test_an_id_is_its_prefix_and_26_characters_of_base_32() -> None:
    assert re.fullmatch(r"job_[0-9a-hjkmnp-tv-z]{26}", new_id("job"))


def test_ids_made_one_after_the_other_sort_in_that_order() -> None:
    ids = [new_id("job") for _ in range(10_000)]
    assert ids == sorted(set(ids))


def test_ids_made_in_several_threads_are_all_different() -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: new_id("job"), range(10_000)))
    assert len(set(ids)) == len(ids)


def test_ids_keep_growing_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_id("job")
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    assert new_id("job") > before
