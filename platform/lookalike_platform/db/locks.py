"""Locks across processes, held until the transaction ends.

On PostgreSQL each waits for its own; on SQLite every writing transaction has all of them from its
first moment. Who needs both takes the queue's last.
"""

from sqlalchemy import text
from sqlalchemy.orm import Session

# Any numbers of our own, for pg_advisory_xact_lock.
_BLOBS = 0x424C4F42
_QUEUE = 0x51554555


def hold_blobs(session: Session) -> None:
    """Wait for the lock on the blobs that rows name.

    A blob is shared by all rows with the same content. Whoever adds such a row puts the blob, or
    finds it, under this lock; whoever deletes a blob asks under it whether a row still needs it.
    """
    _hold(session, _BLOBS)


def hold_queue(session: Session) -> None:
    """Wait for the lock on the number of generations that are queued: who adds one counts them
    under it first."""
    _hold(session, _QUEUE)


def _hold(session: Session, lock: int) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
