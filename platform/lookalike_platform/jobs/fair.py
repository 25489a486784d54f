"""Which queued job comes next, when a message says no more than that there is one.

A message of a kind of job that is shared fairly is a ticket: it names a job, but whoever holds it
takes the one whose turn it is. There are as many tickets as jobs, so that each job is served.
"""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job
from lookalike_platform.jobs.lease import Lease, claim
from lookalike_platform.jobs.states import QUEUED, RUNNING_STATES


def claim_fairly(db: Database, kind: str, worker: str, lease_seconds: float) -> Lease | None:
    """Take the queued job of this kind whose turn it is; None if there is none.

    Of the owner with the fewest running; among such, of the one whom none was begun for longest;
    and of one owner the oldest.
    """
    while True:
        with db.read_session() as session:
            job_id = _next(session, kind)
        if job_id is None:
            return None
        lease = claim(db, job_id, worker, lease_seconds)
        if lease is not None:  # else another was faster
            return lease


def _next(session: Session, kind: str) -> str | None:
    of_kind = Job.kind == kind
    waiting = select(Job.owner, func.min(Job.id)).where(of_kind, Job.state == QUEUED)
    oldest = {row[0]: row[1] for row in session.execute(waiting.group_by(Job.owner))}
    if len(oldest) < 2:
        return next(iter(oldest.values()), None)
    known = of_kind, Job.owner.in_(oldest)
    at_work = select(Job.owner, func.count()).where(*known, Job.state.in_(RUNNING_STATES[kind]))
    running = {row[0]: row[1] for row in session.execute(at_work.group_by(Job.owner))}
    begun = select(Job.owner, func.max(Job.started_at)).where(*known)
    served = {row[0]: row[1] or 0.0 for row in session.execute(begun.group_by(Job.owner))}
    owner = min(oldest, key=lambda one: (running.get(one, 0), served[one], oldest[one]))
    return oldest[owner]
