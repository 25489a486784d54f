import json
import threading
from typing import Any

import httpx
import pytest

from lookalike_api.http import events as streams
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.lease import Lease
from support_api import Api, problem_of


def submit(api: Api) -> str:
    wanted = {"method": "lora", "subject_set": api.add_set()["id"]}
    job_id: str = api.http.post("/v1/jobs", json=wanted).json()["id"]
    return job_id


def run(api: Api, job_id: str) -> Lease:
    lease = leases.claim(api.context.db, job_id, "worker", 60)
    assert lease is not None
    return lease


class Stream:
    """A server-sent stream, read event by event."""

    def __init__(self, api: Api, job_id: str, last: int | None = None) -> None:
        headers = {"Accept": "text/event-stream"}
        if last is not None:
            headers["Last-Event-ID"] = str(last)
        place = f"/v1/jobs/{job_id}/events"
        self._opened = httpx.stream("GET", api.url + place, headers=headers, timeout=60)
        self.response = self._opened.__enter__()
        self._lines = self.response.iter_lines()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)

    def next(self) -> Any:
        """The next event's {"id", "event", "data"}, {} for a comment, None at the end."""
        event: dict[str, Any] = {}
        for line in self._lines:
            if not line:
                if event and "retry" not in event:
                    return event | {"data": json.loads(event["data"])}
                event = {}
            elif line.startswith(":"):
                return {}
            else:
                field, _, value = line.partition(": ")
                event[field] = value
        return None

    def rest(self) -> list[Any]:
        return list(iter(self.next, None))


def test_a_page_of_events_starts_after_the_one_named(api: Api) -> None:
    job_id = submit(api)
    leases.succeed(api.context.db, run(api, job_id), {})
    page = api.http.get(f"/v1/jobs/{job_id}/events?limit=2").json()
    assert [event["payload"]["state"] for event in page["items"]] == ["queued", "preparing"]
    rest = api.http.get(f"/v1/jobs/{job_id}/events?after={page['next_after']}").json()
    assert [event["payload"]["state"] for event in rest["items"]] == ["succeeded"]
    done = api.http.get(f"/v1/jobs/{job_id}/events?after={rest['next_after']}").json()
    assert done == {"items": [], "next_after": rest["next_after"]}


def test_the_stream_tells_all_as_it_comes_and_ends_with_the_job(api: Api) -> None:
    job_id = submit(api)
    with Stream(api, job_id) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        first = stream.next()
        assert (first["event"], first["data"]["payload"]) == ("state", {"state": "queued"})
        assert first["id"] == str(first["data"]["seq"])
        lease = run(api, job_id)
        assert stream.next()["data"]["payload"]["state"] == "preparing"
        leases.progress(api.context.db, lease, {"step": 1, "total": 9})
        progress = stream.next()
        assert (progress["event"], "id" in progress) == ("progress", False)
        assert progress["data"]["payload"] == {"state": "preparing", "step": 1, "total": 9}
        leases.event(api.context.db, lease, "metrics", {"loss": 0.25})
        assert stream.next()["data"]["payload"] == {"loss": 0.25}
        leases.succeed(api.context.db, lease, {})
        assert [event["data"]["payload"]["state"] for event in stream.rest()] == ["succeeded"]


def test_a_broken_stream_is_taken_up_after_the_last_event_seen(api: Api) -> None:
    job_id = submit(api)
    lease = run(api, job_id)
    with Stream(api, job_id) as stream:
        seen = [stream.next(), stream.next()]
    leases.event(api.context.db, lease, "message", {"text": "missed"})
    leases.succeed(api.context.db, lease, {})
    with Stream(api, job_id, last=int(seen[-1]["id"])) as stream:
        missed = stream.rest()
    assert [event["data"]["payload"].get("text") for event in missed] == ["missed", None]
    assert [int(event["id"]) for event in seen + missed] == sorted(
        {int(event["id"]) for event in seen + missed}
    )


def test_nothing_left_to_tell_is_204_so_that_browsers_stop_asking(api: Api) -> None:
    job_id = submit(api)
    leases.succeed(api.context.db, run(api, job_id), {})
    with Stream(api, job_id) as stream:
        last = int(stream.rest()[-1]["id"])
    with Stream(api, job_id, last=last) as stream:
        assert stream.response.status_code == 204


def test_silence_is_filled_with_heartbeats(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.0)
    with Stream(api, submit(api)) as stream:
        stream.next()
        assert stream.next() == {}
        assert stream.next() == {}


def test_many_events_come_once_and_in_order(api: Api) -> None:
    job_id = submit(api)
    lease = run(api, job_id)
    writer = threading.Thread(
        target=lambda: (
            [leases.event(api.context.db, lease, "metrics", {"n": number}) for number in range(300)]
            and leases.succeed(api.context.db, lease, {})
        )
    )
    with Stream(api, job_id) as stream:
        writer.start()
        told = stream.rest()
    writer.join()
    numbers = [e["data"]["payload"]["n"] for e in told if e["data"]["type"] == "metrics"]
    assert numbers == list(range(300))


@pytest.mark.parametrize("last", ["-1", "soon", str(2**63)])
def test_an_event_id_that_is_none_is_refused(api: Api, last: str) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
    problem_of(api.http.get(f"/v1/jobs/{submit(api)}/events", headers=headers), 422)


def test_the_stream_of_no_job_is_404(api: Api) -> None:
    headers = {"Accept": "text/event-stream"}
    problem_of(api.http.get("/v1/jobs/job_0/events", headers=headers), 404)


def test_a_validation_picture_is_got_by_the_digest_its_event_names(api: Api) -> None:
    job_id, other = submit(api), submit(api)
    lease = run(api, job_id)
    digest = api.context.blobs.put(b"a picture")
    payload = {"step": 10, "prompt": "a sks dog", "sha256": digest}
    leases.event(api.context.db, lease, "image", payload)
    (event,) = [
        event
        for event in api.http.get(f"/v1/jobs/{job_id}/events").json()["items"]
        if event["type"] == "image"
    ]
    picture = api.http.get(f"/v1/jobs/{job_id}/images/{event['payload']['sha256']}")
    assert (picture.content, picture.headers["content-type"]) == (b"a picture", "image/png")
    assert api.http.get(f"/v1/jobs/{other}/images/{digest}").status_code == 404
    assert api.http.get(f"/v1/jobs/{job_id}/images/{'0' * 64}").status_code == 404
    assert api.http.get(f"/v1/jobs/{job_id}/images/x").status_code == 422
