"""`lookalike evaluate`: how good an adapter version is."""

from typing import Annotated, Any

import typer

from lookalike_api.cli.connection import Url, connect_or_start
from lookalike_api.cli.output import AsJson, show, table
from lookalike_api.cli.progress import follow
from lookalike_api.client import Json


def evaluate(
    ref: Annotated[str, typer.Argument(metavar="REF", help="rex, rex@candidate or rex@3")],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help='Repeatable: "a {subject} in the snow".'),
    ] = None,
    images: Annotated[int | None, typer.Option("--images", "-n", help="Of each prompt.")] = None,
    class_images: Annotated[
        int | None, typer.Option(help="For the class noun alone, for drift and diversity.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture of each prompt.")] = None,
    subject_set: Annotated[
        str | None, typer.Option(help="Real photos (set_…). Left out: those it learned from.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Paint with an adapter and judge what comes out: fidelity, drift, diversity.

    With no API named and none running, an embedded stack runs for as long as this takes.
    """
    with connect_or_start(url) as look:
        job = look.evaluate(
            ref,
            subject_set=subject_set,
            prompts=prompts,
            images_per_prompt=images,
            class_images=class_images,
            seed=seed,
        )
        follow(look, job["id"], quiet=as_json)
        done = look.evaluation(job["id"])
    show(done, as_json, lambda: _listing(done))


def _listing(done: Json) -> Any:
    rows = (
        (measure.replace("_", " "), judge, f"{figure['mean']:.3f}", _interval(figure))
        for measure, by_judge in (done["figures"] or {}).items()
        for judge, figure in by_judge.items()
    )
    none = f"{done['id']} is {done['state']}: it has no figures."
    return table((done["adapter"], "judge", "mean", "95% interval"), rows, none)


def _interval(figure: Json) -> str:
    if figure["low"] is None:
        return ""
    return f"{figure['low']:.3f} to {figure['high']:.3f} ({figure['count']})"
