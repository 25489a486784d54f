"""Carrying out a job on a worker, whatever its kind: claim it, hold it, write down its end.

claim → work ─┬→ succeeded
              ├→ failed     cause and remedy in the error
              ├→ canceled   its owner asked
              └→ queued     the worker shuts down; or, by the reaper, the database was away
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import InternalError, OperationalError, TimeoutError

from lookalike_platform.db.engine import Database
from lookalike_platform.errors import LookalikeError
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import Hold, held
from lookalike_platform.jobs.lease import Lease, LeaseLost

log = logging.getLogger(__name__)

AWAY = (OperationalError, InternalError, TimeoutError)
"""What a database raises that cannot be reached, is read-only after a failover, or has no more
connections."""

Work = Callable[[Lease, Hold], dict[str, Any] | None]
"""Gives the job's result; None if it stopped before it had one, since it was to stop."""


def carry_out(
    db: Database,
    job_id: str,
    worker: str,
    lease_seconds: float,
    work: Work,
    unforeseen: Callable[[str], LookalikeError],
) -> None:
    """Do `work` if the job is still to be done; its end is written to the database.

    Args:
        unforeseen: makes the job's error of an exception nobody thought of, given in words.
    """
    lease = leases.claim(db, job_id, worker, lease_seconds)
    if lease is not None:
        carry_out_claimed(db, lease, work, unforeseen)


def carry_out_claimed(
    db: Database, lease: Lease, work: Work, unforeseen: Callable[[str], LookalikeError]
) -> None:
    """Do `work` on a job that is this worker's; as `carry_out`."""
    try:
        _hold_and_work(db, lease, work, unforeseen)
    except LeaseLost:
        log.warning("%s went on elsewhere; leaving it alone", lease.job_id)
    except AWAY:
        # The database is away: its owner's mistake it is not, and nothing can be written now.
        log.exception("%s goes on when its lease has ended: the database is away", lease.job_id)


def _hold_and_work(
    db: Database, lease: Lease, work: Work, unforeseen: Callable[[str], LookalikeError]
) -> None:
    try:
        with held(db, lease) as hold:
            result = work(lease, hold)
    except (LeaseLost, *AWAY):
        raise
    except LookalikeError as error:
        leases.fail(db, lease, error.problem())
    except Exception as error:
        log.exception("%s failed", lease.job_id)
        leases.fail(db, lease, unforeseen(f"{type(error).__name__}: {error}").problem())
    else:
        if result is not None:
            leases.succeed(db, lease, result)
        elif hold.cancel_requested:
            leases.cancel(db, lease)
        else:
            leases.release(db, lease)
