"""`lookalike train`: photos or a subject set in, a registered adapter out."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from lookalike_api.cli.connection import Url, connect_or_start
from lookalike_api.cli.output import AsJson, facts, note, show
from lookalike_api.cli.progress import follow
from lookalike_api.client import Client, Json
from lookalike_platform.errors import InvalidRequest


def train(
    subject: Annotated[str, typer.Argument(help="Subject set (set_…), folder of photos, or zip.")],
    concept: Annotated[
        str | None, typer.Option(help="The adapter's name. Left out: the subject set's.")
    ] = None,
    class_noun: Annotated[
        str | None,
        typer.Option("--class-noun", "-c", help="What the subject is; needed for photos."),
    ] = None,
    method: Annotated[str, typer.Option(help="GET /v1/methods lists them.")] = "lora",
    base: Annotated[str | None, typer.Option(help="Base model. Left out: the default.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="File of the method's options: .toml or .json.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One option: steps=400, prior.weight=1."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what it would cost.")] = False,
    detach: Annotated[bool, typer.Option(help="Do not wait; needs a stack that runs.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Learn a subject: upload photos if a folder is given, train, and register the adapter.

    With no API named and none running, an embedded stack runs for as long as this takes.
    """
    if detach:
        from lookalike_api.cli.connection import connect as connection
    else:
        connection = connect_or_start
    chosen = {**_read(config), **parse_options(options or [])}
    with connection(url) as look:
        set_id = _subject_set(look, subject, class_noun, concept)
        request: dict[str, Any] = {
            "method": method,
            "base_model": base,
            "concept": concept,
            "config": chosen,
        }
        if dry_run:
            preview = look.train(set_id, dry_run=True, **request)
            show(preview, as_json, lambda: facts(preview))
            return
        job = look.train(set_id, **request)
        if chosen.get("trigger") is None:
            word = job["request"]["config"]["trigger"]
            note(f"It will answer to {word}, a rare word here; --set trigger=WORD has it another.")
        if not detach:
            job = _wait(look, job, quiet=as_json)
    show(job, as_json, lambda: _say(job))


def _wait(look: Client, job: Json, *, quiet: bool) -> Json:
    try:
        return follow(look, job["id"], quiet=quiet)
    except KeyboardInterrupt:
        look.cancel(job["id"])
        note(f"Canceling {job['id']} (--detach leaves a job running)")
        return look.wait(job["id"])


def _subject_set(look: Client, subject: str, class_noun: str | None, name: str | None) -> str:
    if subject.startswith("set_") and not Path(subject).exists():
        return subject
    if class_noun is None:
        raise InvalidRequest(
            f"Say what the photos in {subject} show: --class-noun dog, or teapot, or backpack."
        )
    made = look.add_subject_set(subject, class_noun=class_noun, name=name)
    for image in made["images"]:
        if image["verdict"] == "refused":
            note(f"{image['filename']} is left out: {image['reason']}")
    return str(made["id"])


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        read: dict[str, Any] = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"Cannot read options from {file}: {error}") from error
    return read


def parse_options(options: list[str]) -> dict[str, Any]:
    """["steps=400", "prior.weight=1"] → {"steps": 400, "prior": {"weight": 1}}.

    A value is JSON where it can be, otherwise text.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        path, equals, text = option.partition("=")
        if not equals:
            raise InvalidRequest(f"--set {option} has no value: write --set {option}=VALUE.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *outer, last = path.split(".")
        place = parsed
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return parsed


def _say(job: Json) -> str:
    if job["state"] == "canceled":
        return f"{job['id']} was canceled."
    if job["state"] != "succeeded":
        return f"{job['id']} is {job['state']}: `lookalike jobs show {job['id']}`"
    made = job["result"]
    ref = f"{made['concept']}@{made['version']}"
    return (
        f"{ref} is learned. Paint it: "
        f'lookalike sample "a <{made["concept"]}> on a blue background" --adapter {ref}'
    )
