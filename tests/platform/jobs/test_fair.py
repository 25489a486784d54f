"""Whose turn it is, on both databases."""

import time

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.fair import claim_fairly
from lookalike_platform.jobs.lease import Lease
from lookalike_platform.jobs.reaper import reap
from support_jobs import look, submit


def take(database: Database) -> tuple[str, Lease]:
    """The owner whose turn it is, and the claim."""
    lease = claim_fairly(database, "generate", "worker", 60)
    assert lease is not None
    return look(database, lease.job_id).job.owner, lease


def test_an_owner_with_little_does_not_wait_for_one_with_much(database: Database) -> None:
    for owner in ["ann"] * 5 + ["bob"] * 2 + ["eve"]:
        submit(database, "generate", owner)
    assert [take(database)[0] for _ in range(8)] == [
        *("ann", "bob", "eve"),  # none runs: who came first
        *("ann", "bob"),
        *("ann", "ann", "ann"),
    ]
    assert claim_fairly(database, "generate", "worker", 60) is None


def test_of_owners_with_as_many_running_the_one_served_longest_ago_is_next(
    database: Database,
) -> None:
    for owner in ("ann", "bob", "ann", "bob"):
        submit(database, "generate", owner)
    served = []
    for _ in range(4):
        owner, lease = take(database)
        served.append(owner)
        leases.succeed(database, lease, {})
        time.sleep(0.01)  # the clock moves on
    assert served == ["ann", "bob", "ann", "bob"]


def test_an_owners_jobs_are_served_oldest_first_and_other_kinds_are_left_alone(
    database: Database,
) -> None:
    submit(database, "train", "ann")
    jobs = [submit(database, "generate", "ann") for _ in range(3)]
    assert [take(database)[1].job_id for _ in range(3)] == jobs
    assert claim_fairly(database, "generate", "worker", 60) is None


def test_a_job_nobody_began_by_its_deadline_fails_and_says_so(database: Database) -> None:
    late, patient, begun, drained = (submit(database, "generate") for _ in range(4))
    with database.session() as session:
        for job_id, seconds in ((late, 5.0), (patient, 500.0), (begun, 5.0), (drained, 5.0)):
            session.get_one(Job, job_id).request = {"deadline_seconds": seconds}
    leases.claim(database, begun, "worker", 600)
    lease = leases.claim(database, drained, "worker", 600)
    assert lease is not None
    leases.progress(database, lease, {"step": 1, "total": 25})
    leases.release(database, lease)
    assert reap(database, time.time() + 10, max_attempts=3).ended == 1
    error = look(database, late).job.error
    assert error is not None
    assert "deadline" in error["detail"]
    assert look(database, patient).job.state == "queued"
    assert look(database, drained).job.state == "queued"
    assert look(database, begun).job.state == "preparing"
