"""A job's progress as a person sees it: a bar in a terminal, now and then a line in a log."""

from types import TracebackType
from typing import Any, Self

from lookalike_api.cli.output import console
from lookalike_api.client import Client, Json

STATES = {
    "queued": "waiting for a worker",
    "preparing": "preparing",
    "training": "training",
    "evaluating": "evaluating",
    "composing": "merging",
    "registering": "registering",
    "sampling": "sampling",
    "succeeded": "done",
    "failed": "failed",
    "canceled": "canceled",
}


def follow(client: Client, job_id: str, *, quiet: bool) -> Json:
    """Show a job's progress until its end and return it.

    Raises:
        LookalikeError: the job failed.
    """
    if quiet:
        return client.wait(job_id)
    with JobBar() as bar:
        return client.wait(job_id, on_progress=bar.progress, on_event=bar.event)


class JobBar:
    """Shows what `Client.wait` reports. In a log: each state, and each tenth of the way."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console(stderr=True)
        self._live = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task(STATES["queued"], total=None, facts="")
        self._state = ""
        self._tenth = 0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def progress(self, now: Json) -> None:
        self._enter_state(now["state"])
        step, total = now.get("step"), now.get("total")
        if step is None or not total:
            return
        facts = _facts(now)
        self._live.update(self._task, completed=step, total=total, facts=facts)
        if not self._console.is_terminal and step * 10 // total > self._tenth:
            self._tenth = step * 10 // total
            self._console.print(f"  {step}/{total}  {facts}", highlight=False)

    def event(self, event: Json) -> None:
        payload = event["payload"]
        if event["type"] == "state":
            self._enter_state(payload["state"])
        elif event["type"] == "message" and (text := payload.get("text")):
            style = {"warning": "yellow", "error": "red"}.get(event["level"], "dim")
            self._console.print(f"  {text}", style=style, markup=False, highlight=False)

    def _enter_state(self, state: str) -> None:
        if state == self._state:
            return
        self._state = state
        said = STATES.get(state, state)
        self._tenth = 0
        self._live.update(self._task, description=said)
        if state == "succeeded":
            done = self._live.tasks[0]
            self._live.update(self._task, total=done.total or 1, completed=done.total or 1)
        if not self._console.is_terminal:
            self._console.print(said, highlight=False)


def _facts(now: dict[str, Any]) -> str:
    """Loss, rate and time left, as far as they are known."""
    said = []
    if (loss := now.get("loss")) is not None:
        said.append(f"loss {loss:.4f}")
    if (rate := now.get("steps_per_second")) is not None:
        said.append(f"{rate:.1f} steps/s")
    if (left := now.get("seconds_left")) is not None:
        said.append(f"{left:.0f} s left")
    return ", ".join(said)
