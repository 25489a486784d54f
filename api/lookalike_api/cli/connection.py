"""Which API a command talks to: the one named, the stack that runs here, or one of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lookalike_api.cli.output import note
from lookalike_api.client import Client
from lookalike_platform.errors import LookalikeError

Url = Annotated[
    str | None,
    typer.Option(envvar="LOOKALIKE_URL", help="The API. Left out: the embedded stack's."),
]


@contextmanager
def connect(url: str | None) -> Iterator[Client]:
    """A client of the API at `url`, or of the stack that runs on this home.

    Raises LookalikeError where there is neither: what answers at the usual address may be another
    home's.
    """
    found = url or _running()
    if not found:
        raise LookalikeError(
            f"No stack runs on {_home()}. Start one with `lookalike up`, "
            "or name an API with --url or LOOKALIKE_URL."
        )
    with Client(found) as client:
        yield client


@contextmanager
def connect_or_start(url: str | None) -> Iterator[Client]:
    """As `connect`, but with no API named and no stack running, one is run during the block."""
    found = url or _running()
    if found:
        with Client(found) as client:
            yield client
        return
    from lookalike_api.cli.settings import read_settings
    from lookalike_api.stack import free_port, run_stack

    settings = read_settings()
    # Nobody else knows this stack's URL, so any port will do.
    settings = settings.model_copy(update={"api_port": free_port(settings.api_host)})
    note("Starting the embedded stack (`lookalike up` keeps one running)")
    with run_stack(settings, note) as stack, Client(stack.url) as client:
        yield client


def _running() -> str | None:
    from lookalike_api.cli.settings import read_settings
    from lookalike_api.stack import find_stack

    return find_stack(read_settings())


def _home() -> Path:
    from lookalike_api.cli.settings import read_settings

    return read_settings().home
