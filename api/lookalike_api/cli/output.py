"""What commands print: with --json the answer alone on standard output, otherwise for people.

Progress and messages go to standard error, so that standard output can always be piped.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookalike_platform.errors import LookalikeError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 200  # of tables that are not read on a terminal

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def show(value: Any, as_json: bool, render: Callable[[], "RenderableType | None"]) -> None:
    """Print `value` as JSON, or what `render` makes of it."""
    if as_json:
        print(json.dumps(value, indent=2))
    elif (made := render()) is not None:
        console().print(made)


def show_error(error: LookalikeError, as_json: bool) -> None:
    """Print the problem+json body on standard output, or the message on standard error."""
    if as_json:
        print(json.dumps(error.problem(), indent=2))
        return
    notes = console(stderr=True)
    notes.print(f"[bold red]{error.title}[/]")
    notes.print(str(error), markup=False, highlight=False)


def console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    made = Console(stderr=stderr, soft_wrap=True)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], none: str) -> "RenderableType":
    """A plain table, or the sentence `none` when it would be empty."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")  # ids are for copying: never cut short
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made if made.row_count else none


def facts(pairs: Mapping[str, object]) -> "RenderableType":
    """Names and values, one pair a line; values of None are left out."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        if value is not None:
            made.add_row(f"[bold]{name}[/]", str(value))
    return made


def when(moment: str | None) -> str | None:
    """An ISO 8601 time of the API, as this machine's clock shows it."""
    if moment is None:
        return None
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def note(text: str) -> None:
    """A line for people that is no part of the answer."""
    print(text, file=sys.stderr, flush=True)
