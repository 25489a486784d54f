"""Errors a person can act on. Each is one problem+json answer (RFC 9457) and one exit message.

LookalikeError
├── InvalidRequest      422  a value the request carries is wrong; `fields` says which
│   └── UnknownBase     422  the base model is not here, with how to get it
├── NotFound            404  no such object, or another owner's
├── Conflict            409  the object's state forbids it
├── TooLarge            413  a body or file above its limit
├── TooMany             429  too much is waiting already; `retry_after` says when to come again
├── CapabilityMissing   501  an optional part is not installed or not configured
├── TooLate             504  not begun by its deadline
└── TrainingFailed      500  a run that stopped: cause, step, remedy
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FieldProblem:
    """One wrong value: where it stands (`config.rank`), what is wrong and what to do."""

    path: str
    message: str


@dataclass(eq=False)
class LookalikeError(Exception):
    """Base of all errors shown to users: `detail` says what happened and what to do."""

    detail: str
    fields: list[FieldProblem] = field(default_factory=list)

    status = 500
    slug = "internal"
    title = "Something went wrong"

    def __str__(self) -> str:
        lines = [self.detail, *(f"  {f.path}: {f.message}" for f in self.fields)]
        return "\n".join(lines)

    def problem(self) -> dict[str, object]:
        """The problem+json body (RFC 9457, section 3)."""
        body: dict[str, object] = {
            "type": f"urn:lookalike:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.fields:
            body["errors"] = [{"path": f.path, "message": f.message} for f in self.fields]
        return body


class InvalidRequest(LookalikeError):
    status, slug, title = 422, "invalid-request", "The request cannot be carried out as it is"


class UnknownBase(InvalidRequest):
    slug, title = "unknown-base", "The base model is not available here"


class NotFound(LookalikeError):
    status, slug, title = 404, "not-found", "No such object"


class Conflict(LookalikeError):
    status, slug, title = 409, "conflict", "The object's state does not allow this"


class TooLarge(LookalikeError):
    status, slug, title = 413, "too-large", "Too large"


@dataclass(eq=False)
class TooMany(LookalikeError):
    retry_after: int = 1  # seconds

    status, slug, title = 429, "too-many", "Too much is waiting already"


class CapabilityMissing(LookalikeError):
    status, slug, title = 501, "capability-missing", "This part is not installed or configured"


class TooLate(LookalikeError):
    status, slug, title = 504, "too-late", "Its deadline has passed"


class TrainingFailed(LookalikeError):
    slug, title = "training-failed", "The training run stopped"


def of_problem(problem: Mapping[str, Any]) -> LookalikeError:
    """The error that another process told as its problem document."""
    kinds = {
        f"urn:lookalike:problem:{kind.slug}": kind
        for kind in (InvalidRequest, UnknownBase, CapabilityMissing, TooLate)
    }
    kind = kinds.get(problem["type"], LookalikeError)
    fields = [FieldProblem(one["path"], one["message"]) for one in problem.get("errors", [])]
    return kind(problem["detail"], fields)


@contextmanager
def fault_of(path: str) -> Iterator[None]:
    """A look-up that fails here is the fault of the request's field at `path`."""
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(error.detail, [FieldProblem(path, error.detail)]) from error
    except InvalidRequest as error:
        raise type(error)(error.detail, [FieldProblem(path, error.detail)]) from error
