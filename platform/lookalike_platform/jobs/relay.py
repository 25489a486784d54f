"""The relay: sends the messages the outbox owes, each at least once."""

import time
from collections.abc import Callable

from sqlalchemy import select, update

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Outbox

Send = Callable[[str, str], None]
"""Sends a job's id to a queue: `send(job_id, queue)`; raises when the broker does not take it."""


def publish_pending(db: Database, send: Send) -> int:
    """Send every message not yet sent, oldest first; return how many were.

    A message is noted as sent after the broker took it: a crash in between sends it twice, which
    the claim makes harmless. What `send` raises ends the round; the rest stays owed.
    """
    with db.read_session() as session:
        pending = select(Outbox.id, Outbox.job_id, Outbox.queue, Outbox.created_at)
        rows = session.execute(pending.where(Outbox.published_at.is_(None)).order_by(Outbox.id))
        owed = rows.all()
    for row in owed:
        send(row.job_id, row.queue)
        with db.session() as session:
            # Owed anew since we looked (created_at moved on): leave it for the next round.
            sent = update(Outbox).where(Outbox.id == row.id, Outbox.created_at == row.created_at)
            session.execute(sent.values(published_at=time.time()))
    return len(owed)
