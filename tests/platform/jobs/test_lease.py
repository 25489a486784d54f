import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lookalike_platform.db.engine import Database
from lookalike_platform.errors import Conflict
from lookalike_platform.jobs import events, lease
from lookalike_platform.jobs.lease import Lease, LeaseLost
from lookalike_platform.jobs.reaper import reap
from lookalike_platform.jobs.store import request_cancel
from support_jobs import look, submit


def claim(db: Database, job_id: str, worker: str = "worker", seconds: float = 30) -> Lease:
    held = lease.claim(db, job_id, worker, seconds)
    assert held is not None
    return held


def test_of_many_workers_that_claim_a_job_one_gets_it(database: Database) -> None:
    job_id = submit(database)
    with ThreadPoolExecutor(4) as pool:
        claims = pool.map(
            lambda number: lease.claim(database, job_id, f"worker-{number}", 30), range(8)
        )
    assert len([held for held in claims if held]) == 1
    assert look(database, job_id).job.attempt == 1


def test_there_is_nothing_to_claim_in_an_unknown_job(database: Database) -> None:
    assert lease.claim(database, "job_0", "worker", 30) is None


def test_a_job_goes_through_its_states_to_a_result(database: Database) -> None:
    job_id = submit(database)
    held = claim(database, job_id)
    assert lease.renew(database, held) is False
    lease.advance(database, held, "training")
    lease.advance(database, held, "training")
    lease.progress(database, held, {"step": 3, "total": 10})
    lease.event(database, held, "metrics", {"loss": 0.5})
    lease.resumed(database, held, 2)
    lease.advance(database, held, "registering")
    lease.succeed(database, held, {"version": 1})
    known = look(database, job_id)
    assert known.states == ["queued", "preparing", "training", "registering", "succeeded"]
    assert known.job.result == {"version": 1}
    assert known.job.progress == {"step": 3, "total": 10}
    assert known.job.lease_owner is None
    assert known.job.finished_at is not None
    assert known.outcomes == ["succeeded"]
    assert known.attempts[0].resumed_step == 2


def test_a_job_never_goes_backwards_nor_to_states_of_another_kind(database: Database) -> None:
    held = claim(database, submit(database, "generate"))
    lease.advance(database, held, "sampling")
    for state in ("preparing", "training", "succeeded", "nonsense"):
        with pytest.raises(Conflict, match=f"from sampling to {state}"):
            lease.advance(database, held, state)


def test_a_failed_job_keeps_its_error(database: Database) -> None:
    job_id = submit(database)
    lease.fail(database, claim(database, job_id), {"detail": "loss is not a number", "step": 7})
    known = look(database, job_id)
    assert known.job.error == {"detail": "loss is not a number", "step": 7}
    assert known.events[-1].level == "error"
    assert known.outcomes == ["failed"]


WRITES: list[Callable[[Database, Lease], object]] = [
    lease.renew,
    lambda db, held: lease.advance(db, held, "training"),
    lambda db, held: lease.progress(db, held, {"step": 1}),
    lambda db, held: lease.event(db, held, "message", {"text": "from the dead"}),
    lambda db, held: lease.resumed(db, held, 1),
    lambda db, held: lease.succeed(db, held, {}),
    lambda db, held: lease.fail(db, held, {}),
    lease.cancel,
    lease.release,
]


def test_a_worker_that_lost_its_lease_can_write_nothing(database: Database) -> None:
    job_id = submit(database)
    stale = claim(database, job_id, "worker")
    reap(database, time.time() + 60, max_attempts=3)
    for taken_again in (False, True):
        if taken_again:
            claim(database, job_id, "worker")  # even by a worker of the same name
        before = len(look(database, job_id).events)
        for write in WRITES:
            with pytest.raises(LeaseLost):
                write(database, stale)
        assert len(look(database, job_id).events) == before


def test_a_drained_job_is_queued_again_and_owed_to_the_broker(database: Database) -> None:
    job_id = submit(database)
    lease.release(database, claim(database, job_id))
    known = look(database, job_id)
    assert (known.job.state, known.outcomes) == ("queued", ["drained"])
    assert known.outbox.published_at is None
    assert claim(database, job_id).fence == 2


def test_a_drained_job_that_was_to_be_canceled_is_canceled(database: Database) -> None:
    job_id = submit(database)
    held = claim(database, job_id)
    with database.session() as session:
        request_cancel(session, "local", job_id)
    lease.release(database, held)
    assert look(database, job_id).job.state == "canceled"


def test_events_are_read_in_order_from_any_point(database: Database) -> None:
    job_id, other = submit(database), submit(database)
    held, noise = claim(database, job_id), claim(database, other)
    for number in range(5):
        lease.event(database, held, "message", {"number": number})
        lease.event(database, noise, "message", {})
    with database.read_session() as session:
        first = events.read(session, job_id, limit=4)
        rest = events.read(session, job_id, after=first[-1].seq)
    numbers = [event.payload["number"] for event in [*first, *rest] if event.type == "message"]
    assert numbers == [0, 1, 2, 3, 4]
