"""Talking HTTP with the API: JSON, pages, files and streams, and errors as they were there."""

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

import httpx

from lookalike_platform import errors
from lookalike_platform.errors import FieldProblem, LookalikeError

Json = dict[str, Any]


class Connection:
    """Requests to the API at `url`. Those refused raise the LookalikeError that it reports.

    An API that does not answer is a LookalikeError too; `ask` and `stream` alone leave it the
    TransportError it is, for those who try again.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        # Lookalike's API is asked directly: no proxy of the environment stands in between.
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def items(self, path: str) -> list[Json]:
        items: list[Json] = self.json("GET", path)["items"]
        return items

    def pages(self, path: str, **filters: str) -> Iterator[Json]:
        params = dict(filters)
        while True:
            page = self.json("GET", path, params=params)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def json(self, method: str, path: str, **kwargs: Any) -> Json:
        answer: Json = self.send(method, path, **kwargs).json()
        return answer

    def send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self.ask(method, path, **kwargs)
        except httpx.TransportError as error:
            raise self.unreachable(error) from error

    def fetch(self, path: str, file: IO[bytes], **kwargs: Any) -> httpx.Headers:
        """Write an answer into the file as it comes: weights may be larger than memory."""
        try:
            with self._http.stream("GET", path, **kwargs) as response:
                if response.is_error:
                    response.read()
                    raise _error_of(response)
                for piece in response.iter_bytes():
                    file.write(piece)
                return response.headers
        except httpx.TransportError as error:
            raise self.unreachable(error) from error

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        response = self._http.request(method, path, **kwargs)
        if response.is_error:
            raise _error_of(response)
        return response

    def stream(self, path: str, after: int) -> Iterator[Json]:
        """Server-sent events, those behind `after`."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        # The server sends a heartbeat every 15 s: a silence of 45 s is a dead connection.
        with self._http.stream("GET", path, headers=headers, timeout=45.0) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                # Every event's JSON fits in one data line; ids and types are inside it too.
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def unreachable(self, error: Exception) -> LookalikeError:
        return LookalikeError(
            f"The Lookalike API at {self.url} does not answer ({error}). "
            "Start it with `lookalike up`, or give the URL where it runs."
        )


def error_from(problem: Mapping[str, Any]) -> LookalikeError:
    """The LookalikeError that `problem` (RFC 9457) was made from."""
    slug = str(problem.get("type", "")).removeprefix("urn:lookalike:problem:")
    known = {
        kind.slug: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, LookalikeError)
    }
    fields = [FieldProblem(f["path"], f["message"]) for f in problem.get("errors", [])]
    detail = problem.get("detail") or problem.get("title") or "The API gave no reason."
    return known.get(slug, LookalikeError)(detail, fields)


def _error_of(response: httpx.Response) -> LookalikeError:
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        return error_from(response.json())
    return LookalikeError(
        f"{response.url} answered {response.status_code} without saying why: "
        "is this the URL of a Lookalike API?"
    )
