"""Whatever happens to jobs, in any order: what must always hold (Hypothesis state machine).

The machine plays the owner, the broker (which repeats, delays and loses messages), workers (which
crash, hang and come back as zombies) and the clock.
"""

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lookalike_platform.db.engine import Database
from lookalike_platform.jobs import lease
from lookalike_platform.jobs.lease import Lease, LeaseLost
from lookalike_platform.jobs.reaper import RESEND_SECONDS, reap
from lookalike_platform.jobs.relay import publish_pending
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.jobs.store import request_cancel
from support_databases import empty
from support_jobs import Known, look, submit

LEASE_SECONDS = 30.0
MAX_ATTEMPTS = 3
AFTER_LEASES = 2 * LEASE_SECONDS
AFTER_RESENDS = 2 * RESEND_SECONDS[1]

ENDS: list[Callable[[Database, Lease], None]] = [
    lambda db, held: lease.succeed(db, held, {"by": held.fence}),
    lambda db, held: lease.fail(db, held, {"by": held.fence}),
    lease.cancel,
    lease.release,
]


class JobMachine(RuleBasedStateMachine):
    database: Database  # set by the test

    jobs = Bundle("jobs")
    claims = Bundle("claims")  # leases, of which most are stale after a while

    def __init__(self) -> None:
        super().__init__()
        self.sent: set[str] = set()  # messages that no claim has answered yet
        self.accepted: list[str] = []
        self.ended: dict[str, tuple[object, ...]] = {}
        self.cancel_asked: set[str] = set()
        self.live: dict[str, Lease] = {}  # the model's own idea of who holds what

    @initialize(target=jobs)
    def start_with_one_job(self) -> str:
        empty(self.database)
        return self.submit_one("train")

    # The owner

    @precondition(lambda self: len(self.accepted) < 2)
    @rule(target=jobs, kind=st.sampled_from(["train", "generate", "evaluate"]))
    def submit(self, kind: str) -> str:
        return self.submit_one(kind)

    def submit_one(self, kind: str) -> str:
        job_id = submit(self.database, kind)  # type: ignore[arg-type]
        self.accepted.append(job_id)
        return job_id

    @rule(job_id=jobs)
    def ask_to_cancel(self, job_id: str) -> None:
        before = self.look(job_id).job.state
        with self.database.session() as session:
            answer = request_cancel(session, "local", job_id)
        expected = "finished" if before in TERMINAL else "requested"
        assert answer == ("canceled" if before == "queued" else expected)
        if answer == "requested":
            self.cancel_asked.add(job_id)

    # The broker and the workers

    def relay(self) -> None:
        publish_pending(self.database, lambda job_id, _: self.sent.add(job_id))

    @rule(target=claims, job_id=jobs)
    def receive(self, job_id: str) -> object:
        """A message may come at any time, late or twice, but that of a queued job has been sent.

        All workers have one name, so that only the fence tells them apart.
        """
        held = self.claim(job_id)
        return multiple() if held is None else held

    def claim(self, job_id: str) -> Lease | None:
        self.relay()
        was = self.look(job_id).job
        held = lease.claim(self.database, job_id, "worker", LEASE_SECONDS)
        assert (held is not None) == (was.state == "queued")
        if held is None:
            return None
        assert job_id in self.sent
        assert held.fence == was.fence + 1
        self.sent.discard(job_id)
        self.live[job_id] = held
        return held

    @rule(held=claims)
    def work(self, held: Lease) -> None:
        def write() -> None:
            assert lease.renew(self.database, held) == (held.job_id in self.cancel_asked)
            lease.progress(self.database, held, {"by": held.fence})

        self.write(held, write)

    @rule(held=consumes(claims), end=st.sampled_from(ENDS))
    def end(self, held: Lease, end: Callable[[Database, Lease], None]) -> None:
        if self.write(held, lambda: end(self.database, held)):
            del self.live[held.job_id]

    # The clock

    @precondition(lambda self: self.live)
    @rule(target=claims, others_take_over=st.booleans())
    def leases_run_out(self, others_take_over: bool) -> object:
        """Every worker crashes or hangs; those that hang go on with stale leases."""
        too_early = reap(self.database, time.time(), MAX_ATTEMPTS)
        assert (too_early.requeued, too_early.ended) == (0, 0)
        in_time = reap(self.database, time.time() + AFTER_LEASES, MAX_ATTEMPTS)
        assert in_time.requeued + in_time.ended == len(self.live)
        lost = list(self.live)
        self.live.clear()
        taken = [self.claim(job_id) for job_id in lost if others_take_over]
        return multiple(*(held for held in taken if held))

    # What always holds

    @invariant()
    def promises_are_kept(self) -> None:
        for job_id in self.accepted:
            known = self.look(job_id)
            self.terminal_states_absorb(known)
            self.the_holder_is_the_last_to_claim(known)
            self.attempts_are_capped_and_one_at_most_is_open(known)

    def terminal_states_absorb(self, known: Known) -> None:
        job = known.job
        if job.state in TERMINAL:
            end = (job.state, job.result, job.error, job.finished_at, len(known.events))
            assert self.ended.setdefault(job.id, end) == end
        else:
            assert job.id not in self.ended

    def the_holder_is_the_last_to_claim(self, known: Known) -> None:
        held = self.live.get(known.job.id)
        holder = (held.worker, held.fence) if held else (None, known.job.fence)
        assert (known.job.lease_owner, known.job.fence) == holder

    def attempts_are_capped_and_one_at_most_is_open(self, known: Known) -> None:
        lost = known.outcomes.count("lost")
        assert lost < MAX_ATTEMPTS or (lost == MAX_ATTEMPTS and known.job.state in TERMINAL)
        assert known.outcomes.count(None) == (known.job.id in self.live)
        assert len(known.attempts) == known.job.attempt

    def teardown(self) -> None:
        """Nothing accepted is lost: though all messages and workers are, every job ends."""
        self.sent.clear()
        for _ in range(MAX_ATTEMPTS):
            reap(self.database, time.time() + AFTER_RESENDS, MAX_ATTEMPTS)
        self.relay()
        for job_id in self.sent:
            held = lease.claim(self.database, job_id, "good", LEASE_SECONDS)
            if held:
                lease.succeed(self.database, held, {})
        assert {self.look(job_id).job.state for job_id in self.accepted} <= TERMINAL

    def look(self, job_id: str) -> Known:
        return look(self.database, job_id)

    def write(self, held: Lease, write: Callable[[], object]) -> bool:
        """Write under a lease, which is refused exactly if the lease is stale."""
        if self.live.get(held.job_id) == held:
            write()
            return True
        with pytest.raises(LeaseLost):
            write()
        return False


def test_jobs_keep_their_promises_whatever_happens(database: Database) -> None:
    class Machine(JobMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
