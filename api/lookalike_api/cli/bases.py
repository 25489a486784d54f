"""`lookalike bases`: the base models that are here, and how to get others."""

from typing import Annotated

import typer

from lookalike_api.cli.connection import Url, connect
from lookalike_api.cli.output import AsJson, note, show, table
from lookalike_api.client import Json

app = typer.Typer(help="Base models to train and sample on.", no_args_is_help=True)


@app.command("list")
def list_bases(url: Url = None, as_json: AsJson = False) -> None:
    """List the base models that are ready to use."""
    with connect(url) as look:
        found = look.base_models()
    rows = (
        (one["name"], one["family"], f"{one['resolution']} px", one["fingerprint"][:12], _mark(one))
        for one in found
    )
    columns = ("name", "family", "resolution", "fingerprint", "")
    show(found, as_json, lambda: table(columns, rows, "No base models."))


def _mark(one: Json) -> str:
    return "default" if one["default"] else ""


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Hub id: organisation/model.")],
    as_json: AsJson = False,
) -> None:
    """Download a base model from the hub to this machine, where jobs then find it by its id."""
    from lookalike_api.cli.settings import read_settings
    from lookalike_platform import bases

    note(f"Downloading {name}")
    folder = bases.fetch(name)
    base = bases.resolve(name, read_settings())
    fetched = {"name": name, "folder": str(folder), "fingerprint": base.fingerprint}
    show(fetched, as_json, lambda: f"{name} is in {folder}.")
