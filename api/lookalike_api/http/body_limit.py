"""A cap on request bodies, counted as the bytes come in: Content-Length is not trusted."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lookalike_api.http.problems import respond
from lookalike_platform.errors import TooLarge


class BodyLimit:
    """ASGI middleware: a body longer than its path's limit is not read to its end.

    Args:
        limit: bytes of a body, where `by_path` does not say otherwise.
        by_path: bytes of a body by path.
    """

    def __init__(self, app: ASGIApp, limit: int, by_path: Mapping[str, int]) -> None:
        self.app, self.limit, self.by_path = app, limit, by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.by_path.get(scope["path"].rstrip("/"), self.limit)
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limit:
            # The client may still be sending and must not wait for us to listen.
            response = respond(_too_large(limit), {"Connection": "close"})
            await response(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise _too_large(limit)
            return message

        await self.app(scope, counted, send)


def _too_large(limit: int) -> TooLarge:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit:,} bytes"
    return TooLarge(f"The body is larger than {size}, the most that is taken here.")
