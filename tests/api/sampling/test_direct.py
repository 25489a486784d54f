"""Generations through the direct connection, with a broker that nobody can reach."""

import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lookalike_api.sampling import direct, task
from lookalike_api.sampling.metrics import exposition
from lookalike_api.sampling.service import Painted
from lookalike_api.stack import free_port
from lookalike_platform.blobs import open_blobs
from lookalike_platform.db.engine import migrate, open_database
from lookalike_platform.errors import Conflict
from lookalike_platform.settings import Settings
from support_api import serving

FIGURES: dict[str, Any] = {
    "active": 2,
    "caches": {
        "host": {
            **dict.fromkeys(("hits", "loads", "failures", "evictions"), 7),
            "bytes": 3,
            "budget_bytes": 9,
            "pinned": 1,
        }
    },
}


def paint(order: Any, on_progress: Any, should_stop: Any) -> Painted:
    path: Path = order.folder / "0.png"
    path.write_bytes(b"a picture")
    return Painted([path], [])


@pytest.mark.processes
def test_a_generation_is_made_though_the_broker_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = "127.0.0.1"
    settings = Settings(
        home=tmp_path,
        broker_url=f"redis://{host}:{free_port(host)}/0",
        sampler_url=f"http://{host}:{free_port(host)}",
    )
    migrate(settings.database_url)
    sampler = type("Sampler", (), {"sample": staticmethod(paint)})()
    db, blobs = open_database(settings.database_url), open_blobs(settings)
    calls = []

    def serve() -> None:
        calls.append(threading.current_thread().name)
        task.run("worker", db, blobs, settings, sampler)

    server = direct.listen(settings.sampler_url, serve, lambda: exposition(FIGURES))
    try:
        with serving(settings) as api:
            made = api.http.post("/v1/generations?wait=20", json={"prompt": "a dog"}).json()
            assert (made["state"], len(made["images"])) == ("succeeded", 1)
            # The message is owed all the same: had the call been lost, it would have done.
            assert calls == ["ticket"]
        told = urllib.request.urlopen(f"{settings.sampler_url}/metrics").read().decode()
    finally:
        server.shutdown()
        server.server_close()
        db.close()
    assert 'lookalike_adapter_cache_hits_total{cache="host"} 7' in told
    assert "lookalike_sampler_active_requests 2" in told


def test_a_sampler_that_does_not_answer_holds_nobody_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    direct.call(f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert "the broker will tell it" in caplog.text


def test_an_address_that_is_taken_is_refused_with_what_to_do() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    first = direct.listen(url, lambda: None, str)
    try:
        with pytest.raises(Conflict, match=r"Cannot listen at .* without LOOKALIKE_SAMPLER_URL"):
            direct.listen(url, lambda: None, str)
    finally:
        first.shutdown()
        first.server_close()
