"""`lookalike dreambench`: methods compared on a folder of subjects, by the papers' protocol."""

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookalike_api.cli.output import AsJson, note
from lookalike_api.cli.settings import read_settings
from lookalike_api.cli.training import parse_options
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.files import atomic_write

if TYPE_CHECKING:
    from lookalike_platform.bases import Base
    from lookalike_trainers.evaluation.protocol import Cell, Contender


def dreambench(
    folder: Annotated[
        Path, typer.Argument(help="Subjects, one a subfolder of photos (and a subject.json).")
    ],
    methods: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Repeatable. Left out: all.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A .toml with a table for each row: method, and its options."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every row.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Left out: the default.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=25, help="Of the paper's 25.")] = 25,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Of each prompt.")] = 4,
    class_images: Annotated[int, typer.Option(min=1, help="Of the class alone.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Results. Left out: `dreambench` in Lookalike's home.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train every method on every subject, paint the paper's prompts, and print one table.

    Needs no stack: it trains and paints here. Stopped, it goes on where it was; nothing is
    computed twice. The table is kept as table.md and table.json beside the results.
    """
    from lookalike_platform import bases
    from lookalike_trainers.evaluation import protocol, table
    from lookalike_trainers.evaluation.bench import open_workshop
    from lookalike_trainers.evaluation.dreambench import read_subjects

    settings = read_settings()
    place = out or settings.home / "dreambench"
    known = bases.resolve(base or settings.default_base, settings)
    rows = _rows(methods, config, parse_options(options or []), known)
    subjects = read_subjects(folder)
    workshop = open_workshop(known, settings, place / "runs", _say)
    asked = protocol.Protocol(workshop.decides(), images, class_images, seed, prompts)

    def on_cell(cell: "Cell", computed: bool) -> None:
        note(f"{cell.contender} on {cell.subject}: {'done' if computed else 'known'}")

    cells = protocol.run(
        asked, rows, subjects, place, workshop.judges(), workshop.train, workshop.paint, on_cell
    )
    made = table.markdown(cells)
    text = json.dumps(table.as_json(cells), indent=2)
    atomic_write(place / "table.md", made)
    atomic_write(place / "table.json", text)
    print(text if as_json else made.rstrip())


def _rows(
    methods: list[str] | None, config: Path | None, options: dict[str, Any], base: "Base"
) -> list["Contender"]:
    """What is compared: the tables of the file, else each method as it comes."""
    from lookalike_trainers.catalog import METHODS
    from lookalike_trainers.evaluation.bench import contender

    if config is None:
        names = methods or [method.name for method in METHODS]
        return [contender(name, name, options, base) for name in names]
    if methods:
        raise InvalidRequest("Name methods in the file or with --method, not both.")
    try:
        tables = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"Cannot read rows from {config}: {error}") from error
    rows = []
    for name, row in tables.items():
        if not isinstance(row, dict):
            raise InvalidRequest(f"{config}: {name} stands outside a table; write [{name}].")
        method = str(row.pop("method", name))
        rows.append(contender(name, method, {**row, **options}, base))
    return rows


def _say(message: dict[str, Any]) -> None:
    if message["type"] == "progress" and message["step"] == message["total"]:
        note(f"  trained {message['total']} steps, loss {message['loss']:.4f}")
