"""`lookalike compose`: several adapters in, one merged version out."""

from typing import Annotated

import typer

from lookalike_api.cli.connection import Url, connect_or_start
from lookalike_api.cli.output import AsJson, show
from lookalike_api.cli.progress import follow
from lookalike_api.cli.sampling import adapter_use
from lookalike_api.client import Json


def compose(
    name: Annotated[str, typer.Argument(help="What the merged adapter is called.")],
    parents: Annotated[
        list[str], typer.Argument(metavar="REF...", help="rex@3, fido, kim@1:0.8 (its scale)")
    ],
    strategy: Annotated[
        str | None, typer.Option(help="`lookalike compositions rules` lists them.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of svd, ties, dare_linear.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Part of the entries that stays: ties, dare_linear.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of ssr, fusion, dare_linear.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one new version; each subject's <name> stays a word of prompts.

    With no API named and none running, an embedded stack runs for as long as this takes.
    """
    given = {"rank": rank, "density": density, "seed": seed}
    options = {key: value for key, value in given.items() if value is not None}
    chosen = [adapter_use(text) for text in parents]
    with connect_or_start(url) as look:
        job = look.compose(name, chosen, strategy=strategy, options=options or None)
        job = follow(look, job["id"], quiet=as_json)
    show(job, as_json, lambda: _say(job))


def _say(job: Json) -> str:
    if job["state"] != "succeeded":
        return f"{job['id']} is {job['state']}: `lookalike jobs show {job['id']}`"
    asked, ref = job["request"], job["result"]["ref"]
    names = [f"<{one['name']}>" for parent in asked["adapters"] for one in parent["subjects"]]
    return (
        f"{ref} is merged by {asked['strategy']}. Paint it: "
        f'lookalike sample "{" and ".join(names)}" --adapter {ref}'
    )
