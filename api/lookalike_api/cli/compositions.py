"""`lookalike compositions`: what combines with what."""

from typing import Any

import typer

from lookalike_api.cli.connection import Url, connect
from lookalike_api.cli.output import AsJson, show, table
from lookalike_api.client import Json

app = typer.Typer(help="Several adapters at once, or merged into one.", no_args_is_help=True)


@app.command("rules")
def list_rules(url: Url = None, as_json: AsJson = False) -> None:
    """What combines with what: in one generation, or merged, and why not."""
    with connect(url) as look:
        found = look.composition_rules()
    show(found, as_json, lambda: _listing(found["combinations"]))


def _listing(pairs: list[Json]) -> Any:
    rows = (
        (
            pair["one"],
            pair["other"],
            pair["together"] or f"no: {pair['refused']}",
            ", ".join(pair["merges"]) or f"no: {pair['unmerged']}",
        )
        for pair in pairs
    )
    return table(("one", "other", "in one generation", "merged by"), rows, "No rules.")
