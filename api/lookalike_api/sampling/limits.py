"""How many generations may wait, and when to come again if they are too many. Torch-free."""

import math

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lookalike_platform.db.locks import hold_queue
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import TooMany
from lookalike_platform.jobs.states import QUEUED, RUNNING_STATES, SUCCEEDED
from lookalike_platform.settings import Settings

RECENT = 20
LONGEST_SECONDS = 600
UNKNOWN_SECONDS = 5.0  # of a generation, before any is finished


def check_room(session: Session, owner: str, settings: Settings) -> None:
    """Raises TooMany if no more of the owner's generations, or of anyone's, may be queued.

    To the end of the transaction nobody else may queue one: it is to come last in it.
    """
    hold_queue(session)
    queued = select(func.count()).where(Job.kind == "generate", Job.state == QUEUED)
    own = session.scalar(queued.where(Job.owner == owner)) or 0
    everyones = session.scalar(queued) or 0
    if own < settings.max_queued_per_owner and everyones < settings.max_queued:
        return
    seconds = _seconds_to_a_place(session)
    whose = (
        f"{own} of your generations"
        if own >= settings.max_queued_per_owner
        else (f"{everyones} generations")
    )
    raise TooMany(
        f"{whose} are waiting, which is as many as may. Try again in {seconds} s, or cancel some.",
        retry_after=seconds,
    )


def _seconds_to_a_place(session: Session) -> int:
    """Until one more is begun: how long recent ones took, shared by those that run at once."""
    finished = (
        select((Job.finished_at - Job.started_at).label("seconds"))
        .where(Job.kind == "generate", Job.state == SUCCEEDED)
        .order_by(Job.id.desc())
        .limit(RECENT)
        .subquery()
    )
    each = session.scalar(select(func.avg(finished.c.seconds))) or UNKNOWN_SECONDS
    at_work = select(func.count()).where(
        Job.kind == "generate", Job.state.in_(RUNNING_STATES["generate"])
    )
    at_once = max(1, session.scalar(at_work) or 0)
    return min(LONGEST_SECONDS, max(1, math.ceil(each / at_once)))
