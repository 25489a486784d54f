"""A whole installation for tests: real processes on real databases and brokers, and a tiny base."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lookalike_api.client import Client
from lookalike_api.stack import free_port, run_stack
from lookalike_platform.settings import Settings
from support_databases import fresh_database, skip_or_fail
from support_images import photo

REDIS = os.environ.get("LOOKALIKE_TEST_REDIS", "redis://127.0.0.1:6379/9")
RABBITMQ = os.environ.get("LOOKALIKE_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")

BROKERS = {"embedded": "", "redis": REDIS, "rabbitmq": RABBITMQ}
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 1, "rank": 2, "checkpoint_every": 2}
PATIENCE = 240.0


@contextmanager
def installation(database: str, broker: str, base: Path, home: Path) -> Iterator[Settings]:
    """Settings of an installation with nothing in it, whose leases run out soon."""
    if broker != "embedded":
        _empty_queues(BROKERS[broker], broker)
    with fresh_database(database, home) as database_url:
        yield Settings(
            home=home,
            database_url=database_url,
            broker_url=BROKERS[broker],
            default_base=str(base),
            api_port=free_port("127.0.0.1"),
            device="cpu",
            lease_seconds=6,
            reap_seconds=0.5,
            stop_grace_seconds=20,
        )


@contextmanager
def running(settings: Settings) -> Iterator[Client]:
    """The stack of `settings`, and a client of it."""
    with run_stack(settings) as stack, Client(stack.url) as client:
        yield client


def photos(folder: Path, number: int = 3) -> Path:
    """A folder of pictures."""
    folder.mkdir(parents=True)
    for place in range(number):
        (folder / f"{place}.jpg").write_bytes(photo(place))
    return folder


def until(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true answer of `what`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s")


def processes_of(home: Path) -> dict[int, str]:
    """Process ids and command lines of running processes that belong to an installation."""
    found = {}
    mark = str(home).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if mark in command or mark in (folder / "environ").read_bytes():
                found[int(folder.name)] = command.replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    found.pop(os.getpid(), None)
    return {pid: command for pid, command in found.items() if command}  # no zombies


def trainers_of(home: Path) -> dict[int, str]:
    """Those of `processes_of` that train."""
    return {pid: c for pid, c in processes_of(home).items() if "lookalike_trainers.run" in c}


def _empty_queues(url: str, name: str) -> None:
    from kombu import Connection

    try:
        with Connection(url, connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
            for queue in ("train", "sample", "evaluate", "compose"):
                connection.SimpleQueue(queue).clear()
    except OSError as error:
        skip_or_fail(name, error)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base model of a few thousand weights."""
    from support_models import save_base

    return save_base(tmp_path_factory.mktemp("bases") / "tiny")
