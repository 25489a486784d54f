import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from lookalike_api.client import Client
from lookalike_platform.errors import Conflict, InvalidRequest, LookalikeError, NotFound
from lookalike_platform.jobs import lease as leases
from lookalike_platform.settings import Settings
from support_api import Api, serving
from support_images import photo, zipped


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "My Dog (2024)"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "1.txt").write_text("a dog in snow\n")
    (folder / "notes.md").write_text("not a photo")
    return folder


def test_a_folder_is_uploaded_with_its_captions_under_its_own_name(api: Api, photos: Path) -> None:
    with api.client as look:
        made = look.add_subject_set(photos, class_noun="dog", captions={"2.jpg": "a dog asleep"})
        assert made["name"] == "my-dog-2024"
        assert [image["filename"] for image in made["images"]] == ["0.jpg", "1.jpg", "2.jpg"]
        captions = [image["caption"] for image in made["images"]]
        assert captions == [None, "a dog in snow", "a dog asleep"]
        assert [one["id"] for one in look.subject_sets()] == [made["id"]]
        assert look.subject_image(made["id"], 0).startswith(b"\x89PNG")
        look.delete_subject_set(made["id"])
        with pytest.raises(NotFound):
            look.subject_set(made["id"])


def test_files_and_a_zip_are_uploaded_too(api: Api, photos: Path, tmp_path: Path) -> None:
    with api.client as look:
        files = sorted(photos.glob("*.jpg"))
        assert len(look.add_subject_set(files, class_noun="dog", name="rex")["images"]) == 3
        packed = tmp_path / "rex.zip"
        packed.write_bytes(zipped({f"{i}.jpg": photo(i) for i in range(4)}).read())
        made = look.add_subject_set(packed, class_noun="dog")
        assert (made["name"], len(made["images"])) == ("rex", 4)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_photos_is_refused_before_anything_is_sent(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    with Client("http://127.0.0.1:1") as look, pytest.raises(InvalidRequest, match=name):
        look.add_subject_set(tmp_path / name, class_noun="dog")


def test_errors_are_raised_as_the_kinds_they_were(api: Api, photos: Path) -> None:
    with api.client as look:
        made = look.add_subject_set(photos, class_noun="dog")
        with pytest.raises(InvalidRequest) as refused:
            look.train(made["id"], config={"rank": -1})
        assert [field.path for field in refused.value.fields] == ["config.rank"]
        job = look.train(made["id"])
        with pytest.raises(Conflict, match=job["id"]):
            look.delete_subject_set(made["id"])


def test_waiting_tells_progress_and_events_and_returns_the_finished_job(
    api: Api, photos: Path
) -> None:
    with api.client as look:
        job_id = look.train(look.add_subject_set(photos, class_noun="dog")["id"])["id"]

        def work() -> None:
            lease = leases.claim(api.context.db, job_id, "worker", 60)
            assert lease is not None
            leases.progress(api.context.db, lease, {"step": 1, "total": 2})
            told.wait()
            leases.event(api.context.db, lease, "message", {"text": "hello"})
            leases.succeed(api.context.db, lease, {"done": True})

        told, progress, kept = threading.Event(), [], []
        worker = threading.Thread(target=work)
        worker.start()

        def on_progress(now: Any) -> None:
            progress.append(now)
            told.set()

        job = look.wait(job_id, on_progress=on_progress, on_event=kept.append)
        worker.join()
    assert (job["state"], job["result"]) == ("succeeded", {"done": True})
    assert progress == [{"state": "preparing", "step": 1, "total": 2}]
    assert [e["payload"].get("state", "-") for e in kept] == [
        "queued",
        "preparing",
        "-",
        "succeeded",
    ]


def test_waiting_for_a_failed_job_raises_its_error(api: Api, photos: Path) -> None:
    with api.client as look:
        job_id = look.train(look.add_subject_set(photos, class_noun="dog")["id"])["id"]
        lease = leases.claim(api.context.db, job_id, "worker", 60)
        assert lease is not None
        leases.fail(api.context.db, lease, InvalidRequest("the loss is NaN").problem())
        with pytest.raises(InvalidRequest, match="NaN"):
            look.wait(job_id)


def test_waiting_for_a_canceled_job_returns_it(api: Api, photos: Path) -> None:
    with api.client as look:
        job_id = look.train(look.add_subject_set(photos, class_noun="dog")["id"])["id"]
        assert look.cancel(job_id)["outcome"] == "canceled"
        assert look.wait(job_id)["state"] == "canceled"
        assert look.attempts(job_id) == []


def test_a_stream_that_breaks_is_taken_up_without_loss_or_doubles(
    api: Api, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api.client as look:
        job_id = look.train(look.add_subject_set(photos, class_noun="dog")["id"])["id"]
        lease = leases.claim(api.context.db, job_id, "worker", 60)
        assert lease is not None
        for number in range(5):
            leases.event(api.context.db, lease, "metrics", {"n": number})
        leases.succeed(api.context.db, lease, {})
        whole = look._api.stream

        def breaking(path: str, after: int) -> Any:
            for number, event in enumerate(whole(path, after)):
                if number == 2:
                    raise httpx.ReadError("connection reset")
                yield event

        monkeypatch.setattr(look._api, "stream", breaking)
        seen = [event["seq"] for event in look.events(job_id)]
    assert len(seen) == 8
    assert seen == sorted(set(seen))


def test_a_server_that_restarts_is_waited_for(tmp_path: Path, photos: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    settings.home.mkdir()
    states: list[str] = []
    with serving(settings) as api:
        port = int(api.url.rpartition(":")[2])
        look = api.client
        job_id = look.train(look.add_subject_set(photos, class_noun="dog")["id"])["id"]
        heard = threading.Event()

        def note(event: Any) -> None:
            states.append(event["payload"]["state"])
            heard.set()

        waiter = threading.Thread(target=lambda: look.wait(job_id, on_event=note))
        waiter.start()
        heard.wait()
    with serving(settings, port) as api:
        api.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        waiter.join()
    look.close()
    assert states == ["queued", "canceled"]


def test_an_api_that_is_not_there_is_an_error_with_what_to_do() -> None:
    with Client("http://127.0.0.1:1", patience=0) as look:
        with pytest.raises(LookalikeError, match="lookalike up"):
            look.adapters()
        with pytest.raises(LookalikeError, match="lookalike up"):
            look.wait("job_0")


def test_something_that_is_no_lookalike_is_told_apart(api: Api) -> None:
    with Client(f"{api.url}/v1/base-models") as look, pytest.raises(LookalikeError):
        look.jobs().__next__()


def test_what_there_is_can_be_listed(api: Api) -> None:
    with api.client as look:
        assert look.base_models()[0]["name"] == "pocket-64"
        assert look.methods()[0]["name"] == "lora"
        assert "ddim" in [sampler["name"] for sampler in look.samplers()]
        assert look.ready()["status"] == "ok"
