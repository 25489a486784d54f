"""The programs of an installation: the whole stack, or the API and workers one by one."""

import os
import signal
import threading
from enum import StrEnum
from typing import Annotated

import typer

from lookalike_api.cli.output import AsJson, note, show
from lookalike_api.cli.settings import read_settings
from lookalike_platform.errors import CapabilityMissing
from lookalike_platform.settings import Settings
from lookalike_platform.telemetry import setup_logging


class Queue(StrEnum):
    train = "train"
    sample = "sample"


Host = Annotated[str | None, typer.Option(help="Left out: LOOKALIKE_API_HOST.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Left out: LOOKALIKE_API_PORT.")]


def up(host: Host = None, port: Port = None, as_json: AsJson = False) -> None:
    """Run the embedded stack in the foreground: API, one training and one sampling worker.

    Ctrl-C stops it; a job in training goes on from its checkpoint the next time.
    """
    from lookalike_api.stack import run_stack

    told_to_stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told_to_stop.set())
    settings = _at(host, port)
    with run_stack(settings, note) as stack:
        ready = {"url": stack.url, "home": str(settings.home), "parts": stack.states()}
        show(
            ready,
            as_json,
            lambda: (
                f"Lookalike is at {stack.url}, what it offers in {stack.url}/openapi.json\n"
                f"Everything is kept in {settings.home}. Ctrl-C stops it."
            ),
        )
        told_to_stop.wait()
        note("Stopping")


def api(host: Host = None, port: Port = None) -> None:
    """Run the HTTP API alone."""
    try:
        from lookalike_api.http.serve import serve
    except ImportError as error:
        raise CapabilityMissing(
            f"The API needs {error.name}: pip install 'lookalike[api]'"
        ) from error
    setup_logging()
    serve(_at(host, port))


def worker(
    queue: Annotated[
        Queue, typer.Option(help="Train adapters (evaluate and merge them), or sample pictures.")
    ],
) -> None:
    """Run one Celery worker. One that trains takes a job at a time, one that samples many."""
    from lookalike_platform.celery_app import app

    setup_logging()
    at_once = read_settings().sample_concurrency if queue is Queue.sample else 1
    if queue is Queue.sample:
        from lookalike_api.sampling.task import listen

        listen()
    modules, queues = {
        Queue.train: (
            [
                "lookalike_trainers.task",
                "lookalike_trainers.evaluation.task",
                "lookalike_trainers.composition.task",
            ],
            ["train", "evaluate", "compose"],
        ),
        Queue.sample: (["lookalike_api.sampling.task"], ["sample"]),
    }[queue]
    app.conf.include = modules
    app.worker_main(
        [
            "worker",
            "--pool=threads",
            f"--concurrency={at_once}",
            f"--queues={','.join(queues)}",
            f"--hostname={queue}-{os.getpid()}@%h",
            "--without-gossip",
            "--without-mingle",
            "--loglevel=INFO",
        ]
    )


def migrate(as_json: AsJson = False) -> None:
    """Bring the database's tables to the newest revision."""
    from lookalike_platform.db import engine

    url = read_settings().database_url
    engine.migrate(url)
    revision = engine.schema_revision(url)
    show({"revision": revision}, as_json, lambda: f"The database is at revision {revision}.")


def _at(host: str | None, port: int | None) -> Settings:
    """The settings, with the address given on the command line."""
    given = {"api_host": host, "api_port": port}
    return read_settings().model_copy(update={k: v for k, v in given.items() if v is not None})
