"""Queueing a job: once per Idempotency-Key, and with its message on the way at once."""

from collections.abc import Callable

from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from lookalike_api.http.context import Context
from lookalike_api.http.shapes import Json
from lookalike_platform.jobs import idempotency
from lookalike_platform.jobs.idempotency import Answer


def submit(
    context: Context,
    owner: str,
    key: str | None,
    wanted: Json,
    queue: Callable[[Session], Json],
) -> Answer:
    """The answer of `queue`, or the first answer to the same `wanted` under the same key.

    `queue` writes the job and returns the body of the answer, which has the job's `id`. An error
    of it leaves nothing behind. Raises InvalidRequest for a key that came with another body.
    """
    with context.db.session() as session:
        answer = idempotency.replay_or_run(
            session, owner, key, wanted, lambda: Answer(202, queue(session))
        )
    context.keeper.wake()
    return answer


def respond(answer: Answer, place: str) -> JSONResponse:
    """202 with the job's place, and a mark if the answer was given before."""
    headers = {"Location": f"{place}/{answer.body['id']}"}
    if answer.replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(answer.body, answer.status, headers)
