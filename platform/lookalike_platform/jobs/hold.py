"""Holding a job while working on it: its lease renewed by a thread, its cancellation noticed."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lookalike_platform.db.engine import Database
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.lease import Lease, LeaseLost

log = logging.getLogger(__name__)

# How often a lease is renewed, which is also when a cancel is noticed.
RENEW_SECONDS = 1.0


class Hold:
    """What the renewing thread has learned about the job since it was claimed."""

    def __init__(self) -> None:
        self.cancel_requested = False
        self.lost = False


@contextmanager
def held(db: Database, lease: Lease) -> Iterator[Hold]:
    """Renew the lease in a thread as long as the block runs."""
    hold = Hold()
    done = threading.Event()

    def renew() -> None:
        while not done.wait(min(RENEW_SECONDS, lease.seconds / 3)):
            try:
                hold.cancel_requested = leases.renew(db, lease)
            except LeaseLost:
                hold.lost = True
                return
            except Exception:
                # The database is away for a moment; the lease outlives several misses.
                log.warning("could not renew the lease of %s", lease.job_id, exc_info=True)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        done.set()
        thread.join()
