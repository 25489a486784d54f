"""`lookalike subjects`: upload photos of a subject, look at the verdicts on them."""

from pathlib import Path
from typing import Annotated

import typer

from lookalike_api.cli.connection import Url, connect
from lookalike_api.cli.output import AsJson, console, facts, show, table, when
from lookalike_api.client import Json

app = typer.Typer(help="Photos to learn subjects from.", no_args_is_help=True)

ClassNoun = Annotated[
    str, typer.Option("--class-noun", "-c", help="What the subject is: dog, teapot, backpack.")
]


@app.command()
def add(
    photos: Annotated[
        Path, typer.Argument(help="Folder of photos, or zip. photo.txt captions photo.jpg.")
    ],
    class_noun: ClassNoun,
    name: Annotated[str | None, typer.Option(help="Left out: the folder's name.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload photos of one subject and print the verdict on each."""
    with connect(url) as look:
        made = look.add_subject_set(photos, class_noun=class_noun, name=name)
    show(made, as_json, lambda: _describe(made))


@app.command("list")
def list_sets(url: Url = None, as_json: AsJson = False) -> None:
    """List the subject sets, newest first."""
    with connect(url) as look:
        sets = list(look.subject_sets())
    rows = (
        (one["id"], one["name"], one["class_noun"], _accepted(one), when(one["created_at"]))
        for one in sets
    )
    columns = ("id", "name", "class noun", "photos", "added")
    show(sets, as_json, lambda: table(columns, rows, "No subject sets: `lookalike subjects add`."))


@app.command("show")
def show_set(set_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Print a subject set: its photos, captions and verdicts."""
    with connect(url) as look:
        found = look.subject_set(set_id)
    show(found, as_json, lambda: _describe(found))


@app.command()
def delete(set_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a subject set that no unfinished job uses."""
    with connect(url) as look:
        look.delete_subject_set(set_id)
    show({"deleted": set_id}, as_json, lambda: f"Deleted {set_id}.")


def _describe(one: Json) -> None:
    out = console()
    out.print(
        facts(
            {
                "id": one["id"],
                "name": one["name"],
                "class noun": one["class_noun"],
                "photos": _accepted(one),
                "digest": one["digest"],
            }
        )
    )
    rows = (
        (
            image["filename"],
            image["verdict"],
            "; ".join([*([image["reason"]] if image["reason"] else []), *image["warnings"]]),
            image["caption"],
        )
        for image in one["images"]
    )
    out.print(table(("file", "verdict", "why", "caption"), rows, "No photos."))


def _accepted(one: Json) -> str:
    kept = sum(image["verdict"] == "accepted" for image in one["images"])
    return f"{kept} of {len(one['images'])}" if kept < len(one["images"]) else str(kept)
