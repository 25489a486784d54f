"""The relay, the reaper and the thread that runs them."""

import threading
import time

import pytest

from lookalike_platform.db.engine import Database
from lookalike_platform.jobs import lease
from lookalike_platform.jobs.keeper import Keeper
from lookalike_platform.jobs.reaper import RESEND_SECONDS, Reaped, reap
from lookalike_platform.jobs.relay import publish_pending
from lookalike_platform.jobs.store import request_cancel
from lookalike_platform.settings import Settings
from support_jobs import look, submit


class Broker:
    """Takes messages, except the first `refusals` times."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.taken: list[tuple[str, str]] = []
        self.took = threading.Event()

    def send(self, job_id: str, queue: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("the broker is away")
        self.taken.append((job_id, queue))
        self.took.set()


def test_the_relay_sends_each_message_to_its_queue_once(database: Database) -> None:
    training, generating = submit(database, "train"), submit(database, "generate")
    broker = Broker()
    assert publish_pending(database, broker.send) == 2
    assert publish_pending(database, broker.send) == 0
    assert broker.taken == [(training, "train"), (generating, "sample")]


def test_the_relay_sends_again_what_the_broker_refused(database: Database) -> None:
    ids = [submit(database) for _ in range(3)]
    broker = Broker(refusals=1)
    with pytest.raises(ConnectionError):
        publish_pending(database, broker.send)
    publish_pending(database, broker.send)
    assert [job_id for job_id, _ in broker.taken] == ids


def test_a_message_owed_anew_while_it_was_sent_is_sent_again(database: Database) -> None:
    job_id = submit(database)
    sent = []

    def send_and_lose(job_id: str, _queue: str) -> None:
        """The broker is so fast that the job is claimed and drained before we note the sending."""
        sent.append(job_id)
        if len(sent) == 1:
            held = lease.claim(database, job_id, "worker", 30)
            assert held is not None
            lease.release(database, held)

    publish_pending(database, send_and_lose)
    publish_pending(database, send_and_lose)
    assert sent == [job_id, job_id]


def test_a_lease_that_is_renewed_is_left_alone(database: Database) -> None:
    held = lease.claim(database, submit(database), "worker", 30)
    assert held is not None
    assert reap(database, time.time() + 20, max_attempts=3) == Reaped()
    assert reap(database, time.time() + 31, max_attempts=3) == Reaped(requeued=1)


def test_a_job_fails_when_it_lost_its_last_worker_and_drains_do_not_count(
    database: Database,
) -> None:
    job_id = submit(database)
    for end in ("lost", "drained", "lost", "drained", "lost"):
        held = lease.claim(database, job_id, "worker", 30)
        assert held is not None
        if end == "drained":
            lease.release(database, held)
        else:
            reap(database, time.time() + 60, max_attempts=3)
    known = look(database, job_id)
    assert known.job.state == "failed"
    assert known.job.error is not None
    assert "worker lost 3 times" in known.job.error["detail"]
    assert "memory" in known.job.error["detail"]
    assert known.outcomes == ["lost", "drained", "lost", "drained", "lost"]


def test_a_lost_job_that_was_to_be_canceled_is_canceled(database: Database) -> None:
    job_id = submit(database)
    lease.claim(database, job_id, "worker", 30)
    with database.session() as session:
        request_cancel(session, "local", job_id)
    assert reap(database, time.time() + 60, max_attempts=3) == Reaped(ended=1)
    assert look(database, job_id).job.state == "canceled"


def test_a_message_the_broker_lost_is_sent_again_ever_more_rarely(database: Database) -> None:
    submit(database)
    broker = Broker()
    publish_pending(database, broker.send)
    soonest, _ = RESEND_SECONDS
    assert reap(database, time.time() + soonest - 5, max_attempts=3) == Reaped()
    assert reap(database, time.time() + soonest + 5, max_attempts=3) == Reaped(resent=1)
    assert publish_pending(database, broker.send) == 1
    assert len(broker.taken) == 2


def test_the_message_of_a_running_job_is_not_sent_again(database: Database) -> None:
    job_id = submit(database)
    publish_pending(database, Broker().send)
    lease.claim(database, job_id, "worker", 10_000)
    assert reap(database, time.time() + 5_000, max_attempts=3) == Reaped()


def test_the_keeper_sends_when_woken_and_survives_a_broker_that_is_away(
    database: Database, settings: Settings
) -> None:
    broker = Broker(refusals=1)
    keeper = Keeper(database, broker.send, settings.model_copy(update={"reap_seconds": 0.05}))
    keeper.start()
    job_id = submit(database)
    keeper.wake()
    assert broker.took.wait(30)
    keeper.stop()
    assert broker.taken[0] == (job_id, "train")


def test_the_keeper_requeues_the_jobs_of_lost_workers(
    database: Database, settings: Settings
) -> None:
    job_id = submit(database)
    lease.claim(database, job_id, "worker", 0.01)
    broker = Broker()
    keeper = Keeper(database, broker.send, settings.model_copy(update={"reap_seconds": 0.05}))
    keeper.start()
    # First the message of the submission, which is still owed, or at once that of the requeue.
    while look(database, job_id).job.state != "queued":
        time.sleep(0.02)
    keeper.stop()
    assert look(database, job_id).outcomes == ["lost"]
