import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lookalike_platform.db.engine import Database
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.jobs.idempotency import Answer, replay_or_run


class Endpoint:
    """Counts how often it ran."""

    def __init__(self) -> None:
        self.runs = 0
        self._lock = threading.Lock()

    def run(self) -> Answer:
        with self._lock:
            self.runs += 1
            return Answer(202, {"run": self.runs})

    def fail(self) -> Answer:
        raise InvalidRequest("no")


def post(db: Database, endpoint: Endpoint, key: str | None, body: object = None) -> Answer:
    with db.session() as session:
        return replay_or_run(session, "local", key, body, endpoint.run)


def test_the_same_key_and_body_get_the_first_answer_again(database: Database) -> None:
    endpoint = Endpoint()
    assert post(database, endpoint, "k", {"a": 1, "b": 2}) == Answer(202, {"run": 1})
    again = post(database, endpoint, "k", {"b": 2, "a": 1})
    assert again == Answer(202, {"run": 1}, replayed=True)
    assert endpoint.runs == 1


def test_the_same_key_with_another_body_is_refused(database: Database) -> None:
    endpoint = Endpoint()
    post(database, endpoint, "k", {"a": 1})
    with pytest.raises(InvalidRequest, match="another body") as caught:
        post(database, endpoint, "k", {"a": 2})
    assert caught.value.status == 422
    assert endpoint.runs == 1


def test_owners_do_not_share_keys(database: Database) -> None:
    endpoint = Endpoint()
    post(database, endpoint, "k")
    with database.session() as session:
        assert not replay_or_run(session, "another", "k", None, endpoint.run).replayed


def test_without_a_key_every_request_runs(database: Database) -> None:
    endpoint = Endpoint()
    assert [post(database, endpoint, None).body["run"] for _ in range(2)] == [1, 2]


def test_concurrent_requests_with_one_key_run_once(database: Database) -> None:
    endpoint = Endpoint()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(database, endpoint, "k"), range(8)))
    assert endpoint.runs == 1
    assert [answer.body for answer in answers] == [{"run": 1}] * 8
    assert [answer.replayed for answer in answers].count(False) == 1


def test_a_request_that_failed_may_be_sent_again(database: Database) -> None:
    endpoint = Endpoint()
    with pytest.raises(InvalidRequest, match="no"), database.session() as session:
        replay_or_run(session, "local", "k", None, endpoint.fail)
    assert post(database, endpoint, "k") == Answer(202, {"run": 1})


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_has_1_to_255_characters(database: Database, key: str) -> None:
    with pytest.raises(InvalidRequest, match="255"):
        post(database, Endpoint(), key)
