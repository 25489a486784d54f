"""Generations as far as the API decides them; pictures are made in tests/api/sampling."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lookalike_api.sampling import direct
from lookalike_platform import bases
from lookalike_platform.db.tables import Job
from lookalike_platform.jobs import lease as leases
from lookalike_platform.settings import Settings
from lookalike_registry.manifest import SubjectRecord
from support_api import Api, paths_of, problem_of, serving
from support_databases import fresh_database
from support_models import save_base
from support_sampling import save_adapter


def ask(api: Api, query: str = "", **wanted: Any) -> Any:
    return api.http.post(f"/v1/generations{query}", json={"prompt": "a dog", **wanted})


def finish(api: Api, generation_id: str) -> str:
    """Do the worker's part: two pictures, which are only bytes here."""
    lease = leases.claim(api.context.db, generation_id, "worker", 60)
    assert lease is not None
    digest = api.context.blobs.put(b"PNG")
    images = [{"seed": seed, "sha256": digest} for seed in (7, 8)]
    result = {"images": images, "warnings": ["cut off"], "seconds": 0.5}
    leases.succeed(api.context.db, lease, result)
    return digest


def test_a_generation_answers_with_everything_decided(api: Api) -> None:
    version = api.add_version("rex")
    answer = ask(api, prompt="<rex> on the moon", adapters=[{"ref": "rex@candidate"}], seed=7)
    assert answer.status_code == 202
    made = answer.json()
    assert answer.headers["location"] == f"/v1/generations/{made['id']}"
    assert made["state"] == "queued"
    assert made["bound_prompt"] == "sks dog on the moon"
    [used] = made["versions"]
    assert used == {
        "asked": "rex@candidate",
        "ref": "rex@1",
        "name": "rex",
        "version": 1,
        "digest": version.digest,
        "scale": 1.0,
    }
    assert (made["base"], made["width"], made["height"]) == ("pocket-64", 64, 64)
    assert (made["seed"], made["warnings"], made["images"]) == (7, [], [])
    assert api.http.get(f"/v1/generations/{made['id']}").json() == made
    assert api.http.get(f"/v1/jobs/{made['id']}").json()["kind"] == "generate"


def test_nobody_waits_for_a_sampler_that_does_not_answer(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, called = threading.Event(), threading.Event()
    calls = []

    def call(url: str) -> bool:
        calls.append(url)
        called.set()
        answered.wait()
        return len(calls) > 1

    monkeypatch.setattr(direct, "call", call)
    caller = direct.Caller("http://sampler")
    monkeypatch.setattr(api.context, "caller", caller)
    assert ask(api).status_code == 202
    assert called.wait(60)
    for _ in range(3):  # as many as came meanwhile, it will not be told of either
        assert ask(api).status_code == 202
    called.clear()
    answered.set()
    deadline = time.monotonic() + 60
    while not caller._due.empty():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask(api).status_code == 202
    assert called.wait(60)
    assert calls == ["http://sampler"] * 2
    caller.close()


def test_an_alias_is_resolved_once(api: Api) -> None:
    api.add_version("rex")
    made = ask(api, adapters=[{"ref": "rex@candidate"}]).json()
    api.add_version("rex")
    again = ask(api, adapters=[{"ref": "rex@candidate"}]).json()
    assert again["versions"][0]["ref"] == "rex@2"
    assert api.http.get(f"/v1/generations/{made['id']}").json()["versions"][0]["ref"] == "rex@1"


@pytest.mark.parametrize(
    "use",
    [
        {"ref": "rex"},
        {"ref": "rex@1"},
        {"ref": "rex@candidate"},
        {"name": "rex"},
        {"name": "rex", "version": 1},
        {"name": "rex", "alias": "candidate"},
        {"name": "rex@candidate"},
    ],
)
def test_an_adapter_can_be_named_by_version_or_alias(api: Api, use: dict[str, Any]) -> None:
    api.add_version("rex")
    [version] = ask(api, adapters=[use | {"scale": 0.5}]).json()["versions"]
    assert (version["ref"], version["scale"]) == ("rex@1", 0.5)


def test_a_missing_seed_is_drawn_and_returned(api: Api) -> None:
    seeds = {ask(api).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_the_last_of_the_pictures_may_have_the_last_seed_there_is(api: Api) -> None:
    assert ask(api, seed=2**32 - 2, num_images=2).status_code == 202


def test_a_prompt_without_the_subject_gets_a_warning(api: Api) -> None:
    api.add_version("rex")
    [warning] = ask(api, adapters=[{"ref": "rex"}]).json()["warnings"]
    assert "<rex>" in warning
    assert "sks dog" in warning


def test_the_same_key_draws_no_second_seed(api: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    wanted = {"prompt": "a dog"}
    first = api.http.post("/v1/generations", json=wanted, headers=headers).json()
    again = api.http.post("/v1/generations", json=wanted, headers=headers).json()
    assert again == first


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a" * 10_000}, "prompt"),
        ({"negative_prompt": "a" * 10_000}, "negative_prompt"),
        ({"prompt": "<tom> runs"}, "prompt"),
        ({"steps": -5}, "steps"),
        ({"steps": "20"}, "steps"),
        ({"steps": 100_000}, "steps"),
        ({"sampler": "plms"}, "sampler"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 2**32 - 1, "num_images": 2}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 17}, "num_images"),
        ({"width": 100}, "width"),
        ({"height": 4096}, "height"),
        ({"width": 2048, "height": 2048, "num_images": 16}, "num_images"),
        ({"base": "no-such-base"}, "base"),
        ({"adapters": [{"ref": "nobody@3"}]}, "adapters[0].ref"),
        ({"adapters": [{"ref": "rex@9"}]}, "adapters[0].ref"),
        ({"adapters": [{"ref": "rex@\x00"}]}, "adapters[0].ref"),
        ({"adapters": [{"ref": "rex", "scale": 100}]}, "adapters[0].scale"),
        ({"adapters": [{"ref": "rex", "weight": 1}]}, "adapters[0].weight"),
        ({"adapters": [{"scale": 1}]}, "adapters[0].ref"),
        ({"adapters": [{"ref": "rex"}, {"ref": "rex@1"}]}, "adapters"),
        ({"adapters": "rex"}, "adapters"),
        ({"guidance": 4}, "guidance"),
        ({"guidance_interval": [0.5, 0.51]}, "guidance_interval"),
        ({"guidance_interval": [0.53, 0.55]}, "guidance_interval"),
    ],
)
def test_a_wrong_request_leaves_nothing(api: Api, wanted: dict[str, Any], path: str) -> None:
    api.add_version("rex")
    before = api.kept()
    assert paths_of(ask(api, **wanted)) == [path]
    assert api.kept() == before


@pytest.mark.parametrize(
    "wanted",
    [
        {"guidance_interval": [0.5, 0.51], "guidance_scale": 1.0},
        {"guidance_interval": [0.5, 0.51], "steps": 100},
        {"guidance_interval": [0.53, 0.55], "sampler": "heun"},
    ],
    ids=["none is asked for", "more steps", "two answers a step"],
)
def test_an_interval_may_be_as_narrow_as_leaves_a_step_to_guide(
    api: Api, wanted: dict[str, Any]
) -> None:
    assert ask(api, **wanted).status_code == 202


def test_an_adapter_of_another_base_is_refused_by_both_names(api: Api) -> None:
    other = str(save_base(api.settings.home / "other"))
    api.add_version("tom", base=other)
    before = api.kept()
    answer = ask(api, prompt="<tom>", adapters=[{"ref": "tom"}], base="pocket-64")
    assert paths_of(answer) == ["adapters[0].ref"]
    message = answer.json()["errors"][0]["message"]
    assert "pocket-64" in message
    assert other in message
    assert api.kept() == before
    assert ask(api, prompt="<tom>", adapters=[{"ref": "tom"}]).json()["base"] == other


def test_adapters_of_two_bases_do_not_mix(api: Api) -> None:
    api.add_version("rex")
    api.add_version("tom", base=str(save_base(api.settings.home / "other")))
    answer = ask(api, prompt="<rex> and <tom>", adapters=[{"ref": "rex"}, {"ref": "tom"}])
    assert paths_of(answer) == ["adapters[1].ref"]


def test_another_owners_adapter_is_not_there(api: Api) -> None:
    api.add_version("rex", owner="somebody")
    assert paths_of(ask(api, adapters=[{"ref": "rex"}])) == ["adapters[0].ref"]


def test_any_text_can_be_a_prompt(api: Api) -> None:
    prompt = "a <, a 犬 \u0001 and\n'; drop table jobs; --"
    made = ask(api, prompt=prompt).json()
    assert api.http.get(f"/v1/generations/{made['id']}").json()["prompt"] == prompt


def test_a_prompt_that_no_database_can_be_asked_about_is_refused(api: Api) -> None:
    assert "prompt" in paths_of(ask(api, prompt="a \u0000 dog"))


def test_waiting_ends_with_the_pictures(api: Api) -> None:
    answers = []
    waiter = threading.Thread(target=lambda: answers.append(ask(api, "?wait=60")))
    waiter.start()
    while not (queued := api.http.get("/v1/jobs").json()["items"]):
        pass
    finish(api, queued[0]["id"])
    waiter.join()
    [answer] = answers
    assert answer.status_code == 200
    assert answer.json()["state"] == "succeeded"
    assert len(answer.json()["images"]) == 2


def test_waiting_gives_up_when_the_time_is_over(api: Api) -> None:
    answer = ask(api, "?wait=0.1")
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")


@pytest.mark.parametrize("wait", ["-1", "nan", "soon", "100000"])
def test_a_wait_that_cannot_be_is_refused(api: Api, wait: str) -> None:
    before = api.kept()
    assert paths_of(ask(api, f"?wait={wait}")) == ["wait"]
    assert api.kept() == before


def test_pictures_are_there_once_it_has_succeeded(api: Api) -> None:
    made = ask(api).json()
    place = f"/v1/generations/{made['id']}/images/0"
    assert "queued" in problem_of(api.http.get(place), 409)["detail"]
    digest = finish(api, made["id"])
    done = api.http.get(f"/v1/generations/{made['id']}").json()
    assert [image["seed"] for image in done["images"]] == [7, 8]
    assert done["images"][0]["url"] == place
    assert done["warnings"] == ["cut off"]
    picture = api.http.get(place)
    assert (picture.content, picture.headers["content-type"]) == (b"PNG", "image/png")
    assert picture.headers["etag"] == f'"{digest}"'
    problem_of(api.http.get(f"/v1/generations/{made['id']}/images/2"), 404)


def test_a_training_is_no_generation(api: Api) -> None:
    wanted = {"method": "lora", "subject_set": api.add_set()["id"]}
    job_id = api.http.post("/v1/jobs", json=wanted).json()["id"]
    assert "/v1/jobs/" in problem_of(api.http.get(f"/v1/generations/{job_id}"), 404)["detail"]


def test_adapters_that_cannot_act_together_are_refused_with_the_reason(
    api: Api, tmp_path: Path
) -> None:
    dora = tmp_path / "dora.safetensors"
    save_adapter(dora, bases.resolve("pocket-64", api.settings).folder, dora=True)
    api.add_version("rex", weights=dora)
    api.add_version("tom", method="dreambooth")
    api.add_version("kim")
    adapters = [{"ref": "kim"}, {"ref": "rex"}]
    assert ask(api, adapters=adapters).status_code == 202
    [problem] = problem_of(ask(api, adapters=[*adapters, {"ref": "tom"}]), 422)["errors"]
    assert problem["path"] == "adapters[2].ref"
    assert "DoRA gives the base's own rows new lengths" in problem["message"]


SUBJECTS = [
    SubjectRecord(name="rex", trigger="sks", class_noun="dog", phrase="{trigger}", learned=True),
    SubjectRecord(
        name="tom", trigger="zwx", class_noun="cat", phrase="{trigger} {class_noun}", learned=False
    ),
    SubjectRecord(name="kim", trigger="vvv", class_noun="cup", phrase="{trigger}", learned=True),
]


@pytest.mark.parametrize(
    ("prompt", "bound"),
    [
        ("<rex>, <tom> and <kim>", "{id}, zwx cat and {id}-3"),
        ("<trio> at sea", "{id} and zwx cat and {id}-3 at sea"),
        ("a vvv beside a sks", "a {id}-3 beside a {id}"),
    ],
)
def test_a_merged_version_answers_to_each_of_its_subjects(
    api: Api, prompt: str, bound: str
) -> None:
    made = api.add_version("trio", prompting={"subjects": SUBJECTS})
    answer = ask(api, prompt=prompt, adapters=[{"ref": "trio"}]).json()
    assert answer["bound_prompt"] == bound.format(id=made.id)


def test_a_subject_comes_from_one_adapter_alone(api: Api) -> None:
    api.add_version("trio", prompting={"subjects": SUBJECTS})
    api.add_version("rex")
    refused = ask(api, prompt="<rex>", adapters=[{"ref": "trio"}, {"ref": "rex"}])
    assert paths_of(refused) == ["adapters"]


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_no_more_may_wait_however_many_are_asked_for_at_once(tmp_path: Path, dialect: str) -> None:
    with fresh_database(dialect, tmp_path) as url:
        settings = Settings(home=tmp_path, database_url=url, max_queued_per_owner=3)
        with serving(settings) as api, ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: ask(api).status_code, range(12)))
            waiting = api.http.get("/v1/jobs?state=queued").json()["items"]
    assert (sorted(answers), len(waiting)) == ([202] * 3 + [429] * 9, 3)


@pytest.mark.parametrize("sampler", ["base", "ddim", "dpmsolver++"])
def test_more_steps_than_the_noise_schedule_has_are_refused(api: Api, sampler: str) -> None:
    base = save_base(api.settings.home / "short")
    config = base / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 30}))
    (problem,) = problem_of(ask(api, base=str(base), steps=31, sampler=sampler), 422)["errors"]
    assert (problem["path"], "1 to 30" in problem["message"]) == ("steps", True)
    assert ask(api, base=str(base), steps=30, sampler=sampler).status_code == 202


@pytest.mark.parametrize(
    ("limit", "whose"),
    [("max_queued_per_owner", "2 of your generations"), ("max_queued", "2 generations")],
)
def test_more_than_may_wait_are_refused_with_when_to_come_again(
    api: Api, monkeypatch: pytest.MonkeyPatch, limit: str, whose: str
) -> None:
    settings = api.context.settings.model_copy(update={limit: 2})
    monkeypatch.setattr(api.context, "settings", settings)
    before = ask(api).json()
    lease = leases.claim(api.context.db, before["id"], "worker", 60)
    assert lease is not None
    leases.succeed(api.context.db, lease, {"images": [], "warnings": [], "seconds": 1})
    with api.context.db.session() as session:
        job = session.get_one(Job, before["id"])
        assert job.started_at is not None
        job.finished_at = job.started_at + 41.5
    for _ in range(2):
        assert ask(api).status_code == 202
    refused = ask(api)
    assert whose in problem_of(refused, 429)["detail"]
    assert refused.headers["retry-after"] == "42"
    waiting = api.http.get("/v1/jobs?state=queued").json()["items"]
    assert len(waiting) == 2
    api.http.post(f"/v1/jobs/{waiting[0]['id']}/cancel")
    assert ask(api).status_code == 202
