"""Idempotency-Key: a POST that is repeated with the same key gets the first answer again.

As in draft-ietf-httpapi-idempotency-key-header: the key is stored with a digest of the body it
came with, and the same key with another body is refused.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lookalike_platform.db.tables import IdempotencyKey
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.files import canonical_digest

MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True)
class Answer:
    """Status and body of a response; `replayed` if an earlier request got it first."""

    status: int
    body: dict[str, Any]
    replayed: bool = False


def replay_or_run(
    session: Session, owner: str, key: str | None, body: object, run: Callable[[], Answer]
) -> Answer:
    """The answer stored under the owner's `key`, or that of `run`, which is then stored.

    `run` must write through `session` only: its writes and the key are one transaction, so an
    error keeps neither. Of concurrent requests with one key, one runs and the others wait for it.
    Without a key, just `run`.

    Raises InvalidRequest for a key used with another body before, or above 255 characters.
    """
    if key is None:
        return run()
    if not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise InvalidRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} characters")
    fingerprint = canonical_digest(body)
    mine = IdempotencyKey(
        owner=owner, key=key, fingerprint=fingerprint, status=0, body={}, created_at=time.time()
    )
    try:
        # The primary key makes a concurrent request with the same key wait here for our commit.
        with session.begin_nested():
            session.add(mine)
    except IntegrityError:
        first = session.get_one(IdempotencyKey, (owner, key))
        if first.fingerprint != fingerprint:
            raise InvalidRequest(
                f"Idempotency-Key {key!r} was used with another body; send a new key"
            ) from None
        return Answer(first.status, first.body, replayed=True)
    answer = run()
    mine.status, mine.body = answer.status, answer.body
    return answer
