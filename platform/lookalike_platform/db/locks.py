"""A lock across processes on the blobs that rows name, held until the transaction ends.

A blob is shared by all rows with the same content. Whoever adds such a row puts the blob, or
finds it, under this lock; whoever deletes a blob asks under it whether a row still needs it.
"""

from sqlalchemy import text
from sqlalchemy.orm import Session

_BLOBS = 0x424C4F42  # any number of our own, for pg_advisory_xact_lock


def hold_blobs(session: Session) -> None:
    """Waits for the lock. On SQLite every writing transaction has it from its first moment."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _BLOBS})
