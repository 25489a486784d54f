"""A generate job's ways to its end, with a stand-in for the sampler; both databases."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from lookalike_api.sampling import task
from lookalike_api.sampling.admission import admit
from lookalike_api.sampling.messages import SampleOrder
from lookalike_api.sampling.requests import GenerationRequest
from lookalike_api.sampling.service import Painted, SamplerDied
from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.jobs import store
from lookalike_platform.jobs.reaper import reap
from lookalike_platform.jobs.work import AWAY
from lookalike_platform.settings import Settings
from support_api import add_version
from support_jobs import look


@dataclass
class Stub:
    """Paints at once, after what `first` does with the order and the two callbacks."""

    first: Callable[..., Any] = lambda order, on_progress, should_stop: None
    orders: list[SampleOrder] = field(default_factory=list)

    def sample(
        self,
        order: SampleOrder,
        on_progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Painted | None:
        self.orders.append(order)
        self.first(order, on_progress, should_stop)
        if should_stop():
            return None
        on_progress(order.steps, order.steps)
        paths = [order.folder / f"{number}.png" for number in range(order.num_images)]
        for number, path in enumerate(paths):
            path.write_text(order.parameters[number])
        return Painted(paths, ["cut off"])


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


@pytest.fixture(autouse=True)
def version(settings: Settings, database: Database, blobs: BlobStore) -> Any:
    return add_version(settings, database, blobs, "rex")


def submit(settings: Settings, database: Database, **wanted: Any) -> str:
    wanted = {"prompt": "<rex>", "adapters": [{"ref": "rex", "scale": 0.5}], "seed": 7} | wanted
    with database.session() as session:
        request = GenerationRequest.model_validate(wanted)
        job, base = admit(session, "local", settings, request)
        new = store.NewJob(
            owner="local",
            kind="generate",
            base_model=base.name,
            base_fingerprint=base.fingerprint,
            request=job.model_dump(mode="json"),
        )
        return store.submit(session, new).id


def carry_out(settings: Settings, database: Database, sampler: Any) -> None:
    """The only job there is gets its turn."""
    task.run("worker", database, open_blobs(settings), settings, sampler)


def test_pictures_are_kept_as_blobs_with_their_seeds_and_parameters(
    settings: Settings, database: Database, blobs: BlobStore, version: Any
) -> None:
    sampler = Stub()
    job_id = submit(settings, database, num_images=2)
    carry_out(settings, database, sampler)
    [order] = sampler.orders
    [adapter] = order.adapters
    assert (order.prompt, adapter.digest, adapter.scale) == ("sks dog", version.digest, 0.5)
    known = look(database, job_id)
    assert known.states == ["queued", "preparing", "sampling", "succeeded"]
    assert known.job.progress["step"] == 25
    assert known.job.result is not None
    assert known.job.result["warnings"] == ["cut off"]
    assert [image["seed"] for image in known.job.result["images"]] == [7, 8]
    second = json.loads(blobs.get(known.job.result["images"][1]["sha256"]))
    assert second["versions"] == [{"ref": "rex@1", "digest": version.digest}]
    assert (second["request"]["seed"], second["request"]["num_images"]) == (8, 1)
    assert GenerationRequest.model_validate(second["request"]).adapters[0].ref == "rex@1"
    assert not order.folder.exists()


def test_a_second_message_for_the_same_job_does_nothing(
    settings: Settings, database: Database
) -> None:
    sampler = Stub()
    submit(settings, database)
    for _ in range(2):
        carry_out(settings, database, sampler)
    assert len(sampler.orders) == 1


def test_a_sampler_that_died_gets_the_order_again(settings: Settings, database: Database) -> None:
    def die_once(order: SampleOrder, *_: Any) -> None:
        if len(sampler.orders) == 1:
            raise SamplerDied("it was killed by signal 9")

    sampler = Stub(die_once)
    job_id = submit(settings, database)
    carry_out(settings, database, sampler)
    known = look(database, job_id)
    assert known.job.state == "succeeded"
    [warning] = [event for event in known.events if event.level == "warning"]
    assert "signal 9" in warning.payload["text"]
    # Whichever order was too much for it, the second try risks no others.
    assert [order.alone for order in sampler.orders] == [False, True]


def test_a_second_try_that_dies_before_it_begins_is_followed_by_a_third(
    settings: Settings, database: Database
) -> None:
    def die(order: SampleOrder, *_: Any) -> None:
        if len(sampler.orders) < 3:
            raise SamplerDied("it was killed by signal 9", begun=len(sampler.orders) == 1)

    sampler = Stub(die)
    job_id = submit(settings, database)
    carry_out(settings, database, sampler)
    assert look(database, job_id).job.state == "succeeded"
    assert [order.alone for order in sampler.orders] == [False, True, True]
    assert not task._suspect.locked()


def test_determinism_and_the_deadline_reach_the_sampler(
    settings: Settings, database: Database
) -> None:
    sampler = Stub()
    job_id = submit(settings, database, deterministic=True, deadline_seconds=60.0)
    carry_out(settings, database, sampler)
    [order] = sampler.orders
    created = look(database, job_id).job.created_at
    assert (order.alone, order.deadline) == (True, created + 60)


def test_a_generation_that_a_worker_had_begun_has_no_deadline_any_more(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = threading.Event()
    monkeypatch.setattr(task, "_shutting_down", shutdown)

    def stop(_order: SampleOrder, on_progress: Any, _should_stop: Any) -> None:
        if not shutdown.is_set():
            on_progress(1, 25)
            shutdown.set()

    sampler = Stub(stop)
    job_id = submit(settings, database, deadline_seconds=60.0)
    carry_out(settings, database, sampler)
    assert look(database, job_id).job.state == "queued"
    shutdown.clear()
    carry_out(settings, database, Stub(lambda order, *_: sampler.orders.append(order)))
    assert look(database, job_id).job.state == "succeeded"
    assert [order.deadline is None for order in sampler.orders] == [False, True]


def test_progress_that_cannot_be_written_costs_no_pictures(
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("UPDATE jobs", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(task.leases, "progress", away)
    job_id = submit(settings, database)
    carry_out(settings, database, Stub())
    assert look(database, job_id).job.state == "succeeded"
    assert "could not write the progress" in caplog.text


@pytest.mark.parametrize("write", ["advance", "succeed"])
@pytest.mark.parametrize("error", AWAY)
def test_a_job_goes_on_later_when_the_database_was_away(
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    write: str,
) -> None:
    def away(*_: Any) -> None:
        raise error("UPDATE jobs", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(task.leases, write, away)
    job_id = submit(settings, database)
    carry_out(settings, database, Stub())
    assert look(database, job_id).job.error is None
    monkeypatch.undo()
    assert reap(database, time.time() + 2 * settings.lease_seconds, max_attempts=3).requeued == 1
    carry_out(settings, database, Stub())
    assert look(database, job_id).job.state == "succeeded"


def test_a_sampler_that_never_starts_fails_the_job(settings: Settings, database: Database) -> None:
    def never(*_: Any) -> None:
        raise SamplerDied("it ended with code 1", begun=False)

    sampler = Stub(never)
    job_id = submit(settings, database)
    carry_out(settings, database, sampler)
    job = look(database, job_id).job
    assert (job.state, len(sampler.orders)) == ("failed", task.STARTS)


def test_a_job_whose_sampler_dies_can_be_canceled(settings: Settings, database: Database) -> None:
    def die(_order: SampleOrder, _progress: Any, should_stop: Callable[[], bool]) -> None:
        with database.session() as session:
            store.request_cancel(session, "local", job_id)
        while not should_stop():
            time.sleep(0.01)
        raise SamplerDied("it was killed by signal 9", begun=False)

    sampler = Stub(die)
    job_id = submit(settings, database)
    carry_out(settings, database, sampler)
    assert (look(database, job_id).job.state, len(sampler.orders)) == ("canceled", 1)


def test_a_negative_prompt_names_subjects_as_a_prompt_does(
    settings: Settings, database: Database
) -> None:
    sampler = Stub()
    elsewhere = {"prompt": "a room", "box": [0, 0, 0.5, 1]}
    submit(settings, database, negative_prompt="two of <rex>", regions=[elsewhere])
    carry_out(settings, database, sampler)
    (order,) = sampler.orders
    assert order.negative_prompt == "two of sks dog"
    assert order.regions[0].negative_prompt == "two of dog"
    with pytest.raises(InvalidRequest) as refused:
        submit(settings, database, negative_prompt="<fido>")
    assert [field.path for field in refused.value.fields] == ["negative_prompt"]


def test_a_sampler_that_keeps_dying_fails_the_job_with_what_to_do(
    settings: Settings, database: Database
) -> None:
    def die(*_: Any) -> None:
        raise SamplerDied("it was killed by signal 9")

    sampler = Stub(die)
    job_id = submit(settings, database)
    carry_out(settings, database, sampler)
    job = look(database, job_id).job
    assert (job.state, len(sampler.orders)) == ("failed", 2)
    assert job.error is not None
    assert "fewer or smaller images" in job.error["detail"]


def test_an_order_that_cannot_be_carried_out_fails_the_job_with_the_reason(
    settings: Settings, database: Database
) -> None:
    def refuse(*_: Any) -> None:
        raise InvalidRequest("the file does not fit")

    job_id = submit(settings, database)
    carry_out(settings, database, Stub(refuse))
    job = look(database, job_id).job
    assert job.error is not None
    assert (job.state, job.error["detail"]) == ("failed", "the file does not fit")


def test_a_defect_fails_the_job_and_is_logged(
    settings: Settings, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: Any) -> None:
        raise ZeroDivisionError

    job_id = submit(settings, database)
    carry_out(settings, database, Stub(break_down))
    job = look(database, job_id).job
    assert job.error is not None
    assert "ZeroDivisionError" in job.error["detail"]
    assert job_id in caplog.text


def test_weights_that_are_gone_fail_the_job(
    settings: Settings, database: Database, blobs: BlobStore, version: Any
) -> None:
    job_id = submit(settings, database)
    blobs.delete(version.digest)
    carry_out(settings, database, Stub())
    job = look(database, job_id).job
    assert job.error is not None
    assert (job.state, "rex@1: its file is gone" in job.error["detail"]) == ("failed", True)
    assert version.digest in job.error["detail"]


def test_a_worker_with_another_base_of_that_name_fails_the_job(
    settings: Settings, database: Database
) -> None:
    job_id = submit(settings, database)
    with database.session() as session:
        session.get_one(Job, job_id).base_fingerprint = "0" * 64
    sampler = Stub()
    carry_out(settings, database, sampler)
    job = look(database, job_id).job
    assert job.error is not None
    assert "other weights" in job.error["detail"]
    assert sampler.orders == []


def test_a_cancel_reaches_the_sampler_and_ends_the_job(
    settings: Settings, database: Database
) -> None:
    def cancel(order: SampleOrder, on_progress: Any, should_stop: Callable[[], bool]) -> None:
        with database.session() as session:
            assert store.request_cancel(session, "local", job_id) == "requested"
        while not should_stop():
            pass

    job_id = submit(settings, database)
    carry_out(settings, database, Stub(cancel))
    known = look(database, job_id)
    assert (known.job.state, known.outcomes) == ("canceled", ["canceled"])


def test_a_shutdown_gives_the_job_back_without_using_up_an_attempt(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(settings, database)
    monkeypatch.setattr(task, "_shutting_down", type("Set", (), {"is_set": lambda self: True})())
    carry_out(settings, database, Stub())
    known = look(database, job_id)
    assert (known.job.state, known.outcomes) == ("queued", ["drained"])
    monkeypatch.undo()
    carry_out(settings, database, Stub())
    assert look(database, job_id).job.state == "succeeded"


def test_a_job_that_went_on_elsewhere_is_left_alone(settings: Settings, database: Database) -> None:
    def lose(order: SampleOrder, on_progress: Any, should_stop: Any) -> None:
        with database.session() as session:
            session.get_one(Job, job_id).fence += 1
        on_progress(1, 25)

    job_id = submit(settings, database)
    carry_out(settings, database, Stub(lose))
    known = look(database, job_id)
    assert (known.job.state, known.job.result, known.outcomes) == ("sampling", None, [None])


def test_the_worker_side_of_sampling_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = "import sys, lookalike_api.sampling.task; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.strip() == "False", said.stderr


def test_a_call_takes_a_place_or_leaves_the_job_to_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places, served = threading.BoundedSemaphore(1), []
    monkeypatch.setattr(task, "_places", lambda: places)
    monkeypatch.setattr(task, "_serve", lambda: served.append(places.acquire(blocking=False)))
    task._called()
    with places:
        task._called()
    task._called()
    assert served == [False, False]  # each had the place, and gave it back
