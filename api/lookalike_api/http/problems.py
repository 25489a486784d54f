"""Every error as application/problem+json (RFC 9457): what happened, where, and what to do."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from lookalike_platform.errors import (
    CapabilityMissing,
    Conflict,
    FieldProblem,
    InvalidRequest,
    LookalikeError,
    NotFound,
    TooLarge,
    TooMany,
)

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class FieldProblemView(BaseModel):
    path: str
    message: str


class Problem(BaseModel):
    """What an error's body holds. `errors` names the wrong values, as in `config.rank`."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblemView] = []


class NotReady(LookalikeError):
    status, slug, title = 503, "not-ready", "Not ready to take work"


EXAMPLES = {
    404: NotFound("there is no job 'job_1'; GET /v1/jobs lists those there are"),
    409: Conflict("Job job_1 uses this set. Wait for it, or cancel it."),
    413: TooLarge("The body is larger than 256 MiB, the most that is taken here."),
    422: InvalidRequest(
        "1 value of the request is wrong.",
        [FieldProblem("config.rank", "Input should be greater than or equal to 1 (got -4)")],
    ),
    429: TooMany("200 of your generations are waiting, which is as many as may.", retry_after=3),
    501: CapabilityMissing("DoRA in kohya's spelling: export it as diffusers"),
    503: NotReady("the broker does not answer (connection refused); start it, or …"),
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these problems, for the OpenAPI document."""
    return {
        status: {
            "description": EXAMPLES[status].title,
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": EXAMPLES[status].problem(),
                }
            },
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem."""
    app.add_exception_handler(LookalikeError, _lookalike)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def respond(error: LookalikeError, headers: Mapping[str, str] | None = None) -> Response:
    if isinstance(error, TooMany):
        headers = {"Retry-After": str(error.retry_after)}
    # ASCII, because a refused value may hold what UTF-8 cannot (a lone surrogate).
    body = json.dumps(error.problem()).encode("ascii")
    return Response(body, error.status, headers=headers, media_type=MEDIA_TYPE)


def fields_of(errors: Iterable[Any], prefix: str = "") -> list[FieldProblem]:
    """pydantic's errors with the paths a user knows: ("config", "rank") is `config.rank`."""
    return [FieldProblem(_path(prefix, error["loc"]), _message(error)) for error in errors]


def _lookalike(_: Request, error: Exception) -> Response:
    assert isinstance(error, LookalikeError)
    return respond(error)


def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors[0]["type"] == "json_invalid" and isinstance(errors[0]["loc"][-1], int):
        reason = errors[0]["ctx"]["error"]
        return respond(InvalidRequest(f"The body is not valid JSON: {reason}."))
    # The first part of a place is body, query, path or header.
    return respond(
        wrong_values(fields_of({**problem, "loc": problem["loc"][1:]} for problem in errors))
    )


def wrong_values(fields: Sequence[FieldProblem]) -> InvalidRequest:
    count = "1 value" if len(fields) == 1 else f"{len(fields)} values"
    verb = "is" if len(fields) == 1 else "are"
    return InvalidRequest(f"{count} of the request {verb} wrong.", list(fields))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__
    if isinstance(cause, LookalikeError):  # raised while the body was read
        return respond(cause)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    problem = LookalikeError(_detail(request, error))
    problem.status, problem.title = error.status_code, str(error.detail)
    problem.slug = problem.title.lower().replace(" ", "-")
    if error.status_code == 400:
        problem.slug, problem.title = "unreadable", "The request cannot be read"
    return respond(problem, headers)


def _detail(request: Request, error: HTTPException) -> str:
    path = request.url.path
    match error.status_code:
        case 404:
            return f"There is nothing at {path}. GET /openapi.json describes what there is."
        case 405:
            return (
                f"{path} does not take {request.method}; it takes {', '.join(_methods(request))}."
            )
        case 400:
            return f"The body cannot be read ({error.detail}). Send it as /openapi.json describes."
        case _:
            return str(error.detail)


def _methods(request: Request) -> list[str]:
    """All methods of a path; Starlette's own answer knows only those of one of its routes."""
    app: FastAPI = request.app
    return sorted(
        method.upper()
        for path, methods in app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in methods
    )


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond(
        LookalikeError("The API met an error of its own; its log says more. Nothing was accepted.")
    )


def _path(prefix: str, loc: Sequence[int | str]) -> str:
    path = prefix
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "is not known here: remove it, or correct its spelling"
        case "missing":
            return "is missing"
        case "value_error":
            return str(error["ctx"]["error"])
    message: str = error["msg"]
    value = error.get("input")
    if isinstance(value, (str, int, float, bool)) and len(shown := repr(value)) <= 80:
        return f"{message} (got {shown})"
    return message
