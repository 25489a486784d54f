"""The sampler's figures: when they are told, and what a scrape reads."""

from types import SimpleNamespace

import pytest

from lookalike_api.sampling import metrics
from lookalike_api.sampling.metrics import Pace, exposition


def test_figures_are_told_as_orders_begin_and_end_and_once_a_second_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    pace = Pace()

    def due(kind: str, after: float = 0.0) -> bool:
        clock.now += after
        return pace.due({"type": kind})

    assert due("begun")
    assert not due("progress", after=0.5)
    assert due("begun")
    assert not due("progress", after=0.9)
    assert due("progress", after=0.1)
    assert not due("progress")
    assert due("done")


def test_a_scrape_before_the_first_order_reads_zeros() -> None:
    lines = exposition({}).splitlines()
    for cache in ("host", "device"):
        for name in ("hits_total", "loads_total", "failures_total", "evictions_total"):
            assert f'lookalike_adapter_cache_{name}{{cache="{cache}"}} 0' in lines
        for name in ("bytes", "budget_bytes", "pinned"):
            assert f'lookalike_adapter_cache_{name}{{cache="{cache}"}} 0' in lines
    assert "lookalike_sampler_active_requests 0" in lines
