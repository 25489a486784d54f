import pytest

from lookalike_platform.db.engine import Database
from lookalike_platform.errors import InvalidRequest, NotFound
from lookalike_platform.jobs import lease, store
from support_jobs import look, submit


def cancel(db: Database, job_id: str) -> str:
    with db.session() as session:
        return store.request_cancel(session, "local", job_id)


def test_a_submitted_job_is_queued_with_its_message_and_first_event(database: Database) -> None:
    job_id = submit(database)
    known = look(database, job_id)
    assert known.job.state == "queued"
    assert (known.outbox.queue, known.outbox.published_at) == ("train", None)
    assert known.states == ["queued"]
    assert known.job.result is None


def test_a_job_whose_transaction_fails_was_never_there(database: Database) -> None:
    new = store.NewJob(
        owner="local", kind="train", base_model="b", base_fingerprint="f", request={}
    )

    def submit_and_break_off() -> None:
        with database.session() as session:
            store.submit(session, new)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        submit_and_break_off()
    with database.read_session() as session:
        assert store.list_jobs(session, "local") == ([], None)


def test_a_text_that_no_query_gets_past_is_refused_with_its_place(database: Database) -> None:
    asked = {"prompt": "a dog", "regions": [{"prompt": "a cat"}, {"prompt": "a \0"}]}
    new = store.NewJob(
        owner="local", kind="generate", base_model="b", base_fingerprint="f", request=asked
    )
    with pytest.raises(InvalidRequest) as refused, database.session() as session:
        store.submit(session, new)
    assert [field.path for field in refused.value.fields] == ["regions[1].prompt"]


def test_another_owners_job_is_not_found(database: Database) -> None:
    job_id = submit(database, owner="somebody")
    with database.session() as session:
        with pytest.raises(NotFound):
            store.get(session, "local", job_id)
        with pytest.raises(NotFound):
            store.request_cancel(session, "local", job_id)
        assert store.list_jobs(session, "local") == ([], None)


def test_jobs_are_listed_newest_first_page_by_page(database: Database) -> None:
    ids = [submit(database) for _ in range(5)]
    with database.read_session() as session:
        first, cursor = store.list_jobs(session, "local", limit=2)
        second, cursor = store.list_jobs(session, "local", limit=2, cursor=cursor)
        third, end = store.list_jobs(session, "local", limit=2, cursor=cursor)
    assert [job.id for job in [*first, *second, *third]] == ids[::-1]
    assert end is None


def test_a_list_is_narrowed_by_state_kind_and_method(database: Database) -> None:
    training, generating = submit(database, "train"), submit(database, "generate")
    cancel(database, training)
    with database.read_session() as session:

        def ids(**filters: str) -> list[str]:
            return [job.id for job in store.list_jobs(session, "local", **filters)[0]]  # type: ignore[arg-type]

        assert ids(kind="generate") == [generating]
        assert ids(method="lora") == [training]
        assert ids(state="canceled") == [training]
        assert ids(state="canceled", kind="generate") == []


@pytest.mark.parametrize("wrong", [{"state": "lost"}, {"kind": "paint"}, {"cursor": "7"}])
def test_a_list_by_what_cannot_be_is_refused(database: Database, wrong: dict[str, str]) -> None:
    with database.read_session() as session, pytest.raises(InvalidRequest):
        store.list_jobs(session, "local", **wrong)  # type: ignore[arg-type]


def test_cancelling_tells_apart_canceled_requested_and_finished(database: Database) -> None:
    queued, running = submit(database), submit(database)
    held = lease.claim(database, running, "worker", 30)
    assert held is not None
    assert cancel(database, queued) == "canceled"
    assert cancel(database, queued) == "finished"
    assert cancel(database, running) == "requested"
    assert cancel(database, running) == "requested"
    assert lease.renew(database, held)
    lease.cancel(database, held)
    assert cancel(database, running) == "finished"
    texts = [event.payload for event in look(database, running).events if event.type == "message"]
    assert texts == [{"text": "cancellation requested"}]
