"""`lookalike`: the command line. Commands import what they need when they run, so help is quick."""

import sys

import typer

from lookalike_api.cli import (
    adapters,
    bases,
    compositions,
    demo,
    doctor,
    jobs,
    sampling,
    services,
    subjects,
)
from lookalike_api.cli.composing import compose
from lookalike_api.cli.dreambench import dreambench
from lookalike_api.cli.evaluation import evaluate
from lookalike_api.cli.output import show_error
from lookalike_api.cli.training import train
from lookalike_platform.errors import LookalikeError
from lookalike_trainers.pretrain import cli as pretrain

app = typer.Typer(
    help="Learn a subject from a few photos and paint it anywhere.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
app.command()(train)
app.command()(sampling.sample)
app.command()(evaluate)
app.command()(compose)
app.command()(dreambench)
app.add_typer(subjects.app, name="subjects")
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(compositions.app, name="compositions")
app.add_typer(bases.app, name="bases")
app.command()(services.up)
app.command()(doctor.doctor)
app.command()(demo.demo)
app.command()(services.api)
app.command()(services.worker)
app.command()(services.migrate)
app.add_typer(pretrain.app, name="pretrain")


def main() -> None:
    try:
        app()
    except LookalikeError as error:
        show_error(error, as_json="--json" in sys.argv)
        sys.exit(1)


if __name__ == "__main__":
    main()
