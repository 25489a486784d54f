"""`lookalike jobs`: look at jobs, follow them, cancel them."""

import json
from typing import Annotated

import typer

from lookalike_api.cli.connection import Url, connect
from lookalike_api.cli.output import AsJson, console, facts, show, table, when
from lookalike_api.cli.progress import STATES
from lookalike_api.client import FINAL_STATES, Json

app = typer.Typer(
    help="Trainings and generations, waiting, running and past.", no_args_is_help=True
)

OUTCOMES = {
    "canceled": "{id} is canceled.",
    "requested": "{id} will stop soon: `lookalike jobs show {id}` says when it has.",
    "finished": "{id} was finished already: it {state}.",
}


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATES)}.")] = None,
    kind: Annotated[str | None, typer.Option(help="train or generate.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, …")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first."""
    with connect(url) as look:
        jobs = list(look.jobs(state=state, kind=kind, method=method))
    rows = (
        (job["id"], job["kind"], job["state"], _steps(job), job["concept"], when(job["created_at"]))
        for job in jobs
    )
    columns = ("id", "kind", "state", "steps", "concept", "submitted")
    show(jobs, as_json, lambda: table(columns, rows, "No jobs."))


@app.command("show")
def show_job(job_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Print a job, who worked on it, and how it ended."""
    with connect(url) as look:
        job = {**look.job(job_id), "attempts": look.attempts(job_id)}
    show(job, as_json, lambda: _describe(job))


@app.command()
def events(
    job_id: str,
    after: Annotated[int, typer.Option(help="Only those after this sequence number.")] = 0,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events as they come, until its end. With --json, one object a line."""
    out = console()
    with connect(url) as look:
        for event in look.events(job_id, after=after):
            if as_json:
                print(json.dumps(event), flush=True)
            elif event["type"] != "progress":
                said = ", ".join(f"{name} {value}" for name, value in event["payload"].items())
                line = f"{event['seq']:>6}  {when(event['created_at'])}  {event['type']:<8} {said}"
                out.print(line, markup=False, highlight=False)


@app.command()
def cancel(job_id: str, url: Url = None, as_json: AsJson = False) -> None:
    """Ask a job to stop."""
    with connect(url) as look:
        answer = look.cancel(job_id)
    said = OUTCOMES[answer["outcome"]].format(id=job_id, state=answer["job"]["state"])
    show(answer, as_json, lambda: said)


def _describe(job: Json) -> None:
    out = console()
    out.print(
        facts(
            {
                "id": job["id"],
                "kind": job["kind"],
                "state": job["state"],
                "steps": _steps(job),
                "loss": job["progress"].get("loss"),
                "method": job["method"],
                "concept": job["concept"],
                "subject set": job["subject_set"],
                "base model": job["base_model"],
                "submitted": when(job["created_at"]),
                "started": when(job["started_at"]),
                "finished": when(job["finished_at"]),
                "request": json.dumps(job["request"]),
                "result": json.dumps(job["result"]) if job["result"] else None,
                "error": job["error"]["detail"] if job["error"] else None,
            }
        )
    )
    rows = (
        (
            attempt["number"],
            attempt["worker"],
            when(attempt["started_at"]),
            when(attempt["ended_at"]),
            attempt["resumed_step"],
            attempt["outcome"],
        )
        for attempt in job["attempts"]
    )
    columns = ("attempt", "worker", "started", "ended", "resumed at step", "outcome")
    out.print(table(columns, rows, "No worker has taken it yet."))
    if job["state"] not in FINAL_STATES:
        out.print(f"Follow it: lookalike jobs events {job['id']}")


def _steps(job: Json) -> str | None:
    step, total = job["progress"].get("step"), job["progress"].get("total")
    return None if step is None else f"{step}/{total}"
