"""`lookalike adapters`: what was learned, in versions."""

from pathlib import Path
from typing import Annotated

import typer

from lookalike_api.cli.connection import Url, connect
from lookalike_api.cli.output import AsJson, show, table, when
from lookalike_platform.errors import InvalidRequest

app = typer.Typer(help="Learned subjects, their versions and files.", no_args_is_help=True)


@app.command("list")
def list_adapters(url: Url = None, as_json: AsJson = False) -> None:
    """List the adapters with their newest versions and aliases."""
    with connect(url) as look:
        adapters = look.adapters()
    rows = (
        (
            one["name"],
            one["latest_version"],
            _aliases(one["aliases"]),
            one["versions"],
        )
        for one in adapters
    )
    columns = ("name", "newest", "aliases", "versions")
    show(adapters, as_json, lambda: table(columns, rows, "No adapters: `lookalike train`."))


@app.command("show")
def show_adapter(name: str, url: Url = None, as_json: AsJson = False) -> None:
    """List an adapter's versions."""
    with connect(url) as look:
        versions = look.adapter_versions(name)
    rows = (
        (
            one["ref"],
            ", ".join(one["aliases"]),
            one["method"],
            one["base_model"],
            one["job_id"],
            when(one["created_at"]),
        )
        for one in versions
    )
    columns = ("version", "aliases", "method", "base model", "job", "registered")
    show(versions, as_json, lambda: table(columns, rows, f"{name} has no versions."))


@app.command()
def alias(
    name: str,
    label: Annotated[str, typer.Argument(metavar="ALIAS", help="production, or any other name.")],
    version: int,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Let NAME@ALIAS mean a version from now on."""
    with connect(url) as look:
        answer = look.set_alias(name, label, version)
    show(answer, as_json, lambda: f"{name}@{label} is version {version}.")


@app.command()
def delete(
    ref: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Delete one version of an adapter."""
    name, _, version = ref.partition("@")
    if not version.isdecimal():
        raise InvalidRequest(f"Say which version: {name}@3. `lookalike adapters show {name}`")
    with connect(url) as look:
        look.delete_version(name, int(version))
    show({"deleted": ref}, as_json, lambda: f"Deleted {ref}.")


@app.command()
def download(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION or @ALIAS]")],
    out: Annotated[Path | None, typer.Option(help="Folder. Left out: NAME.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Save a version's weights, sample sheet and record; diffusers reads the folder."""
    with connect(url) as look:
        saved = look.download(ref, out or Path(ref.partition("@")[0]))
    paths = [str(path) for path in saved]
    show({"files": paths}, as_json, lambda: "\n".join(paths))


@app.command()
def export(
    ref: Annotated[str, typer.Argument(metavar="NAME[@VERSION or @ALIAS]")],
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    form: Annotated[
        str, typer.Option("--format", help="diffusers, lora, kohya or model.")
    ] = "kohya",
    rank: Annotated[
        int | None, typer.Option(help="Of a LoRA made of what DreamBooth or SVDiff changed.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Save a version as other programs load it: kohya is for A1111 and ComfyUI.

    model is the whole base with what DreamBooth, SVDiff or DiffFit changed in it.
    """
    with connect(url) as look:
        saved, left_out = look.export(ref, form, folder, rank)
    paths = [str(path) for path in saved]
    note = f"\nA LoRA holds it but for {left_out:.0%} of its change." if left_out else ""
    report = {"files": paths, "left_out": left_out}
    show(report, as_json, lambda: "\n".join(paths) + note)


@app.command("import")
def import_adapter(
    files: Annotated[list[Path], typer.Argument(help="Weights, a learned word, or both.")],
    name: Annotated[str, typer.Option(help="What it is to be called here.")],
    class_noun: Annotated[str, typer.Option(help="What the subject is: dog.")],
    trigger: Annotated[str, typer.Option(help="The word that prompts use.")],
    base: Annotated[str | None, typer.Option(help="What it was trained on.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of another program's adapter: LoRA of diffusers or kohya, embeddings, …"""
    with connect(url) as look:
        version = look.import_adapter(
            files, name=name, class_noun=class_noun, trigger=trigger, base=base
        )
    show(version, as_json, lambda: f"{version['ref']}, a {version['method']} adapter.")


def _aliases(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} → {version}" for alias, version in sorted(aliases.items()))
