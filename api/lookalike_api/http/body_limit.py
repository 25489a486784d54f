"""A cap on request bodies, counted as the bytes come in: Content-Length is not trusted."""

import asyncio
import contextlib
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lookalike_api.http.problems import respond
from lookalike_platform.errors import TooLarge

# A connection closed on a client that is still sending is reset, and the answer lost with it. So
# the rest of a body that is too long is read and thrown away, within reason.
LINGER_SECONDS = 3.0
LINGER_BYTES = 2**24


class BodyLimit:
    """ASGI middleware: a body longer than its path's limit is refused, and not kept.

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
            if int(announced) <= limit + LINGER_BYTES:
                await _throw_away(receive)
            response = respond(_too_large(limit), {"Connection": "close"})
            await response(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                if message.get("more_body"):
                    await _throw_away(receive)
                raise _too_large(limit)
            return message

        await self.app(scope, counted, send)


async def _throw_away(receive: Receive) -> None:
    """Read what the client still sends, for `LINGER_SECONDS` and `LINGER_BYTES` at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            taken, more = 0, True
            while more and taken < LINGER_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)


def _too_large(limit: int) -> TooLarge:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit:,} bytes"
    return TooLarge(f"The body is larger than {size}, the most that is taken here.")
