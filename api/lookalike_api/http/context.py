"""What every route works with, and whose objects it may touch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Request

from lookalike_api.sampling.direct import Caller
from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.jobs.idempotency import MAX_KEY_CHARACTERS
from lookalike_platform.jobs.keeper import Keeper
from lookalike_platform.settings import Settings


@dataclass
class Context:
    """The API's means, made once by `create_app`.

    caller: to the sampler, if the settings say where it listens
    stopping: whether the server is shutting down
    """

    settings: Settings
    db: Database
    blobs: BlobStore
    keeper: Keeper
    caller: Caller | None = None
    stopping: Callable[[], bool] = lambda: False


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Lookalike = Annotated[Context, Depends(_context)]


def _owner(context: Lookalike) -> str:
    """Whose request this is. The one place to ask, for when API keys name others."""
    return context.settings.owner


Owner = Annotated[str, Depends(_owner)]

# Ids and names as paths carry them; what does not look like one is refused before any look-up.
Id = Annotated[str, Path(pattern=r"^[a-z]+_[0-9a-z]{1,40}$")]
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9][\w.-]{0,62}$")]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY_CHARACTERS,
        pattern=r"^[\x21-\x7e]+$",
        description="Repeat a request with the same key and body to get the first answer again.",
    ),
]
