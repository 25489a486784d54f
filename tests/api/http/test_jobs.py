import json
from pathlib import Path
from typing import Any

import pytest

from lookalike_platform.bases import resolve
from lookalike_platform.db.tables import Job
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.store import get
from lookalike_trainers.assignment import assignment, run_request
from lookalike_trainers.config import PriorConfig
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.rare_tokens import rare_words
from support_api import Api, paths_of, problem_of
from support_models import save_base


def submit(api: Api, key: str | None = None, **changes: Any) -> Any:
    wanted = {"method": "lora", "subject_set": api.add_set()["id"]} | changes
    headers = {"Idempotency-Key": key} if key else {}
    return api.http.post("/v1/jobs", json=wanted, headers=headers)


def test_a_job_on_a_large_base_begins_with_defaults_for_it(api: Api, tmp_path: Path) -> None:
    base = save_base(tmp_path / "large")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 128}))
    job = submit(api, base_model=str(base), config={"rank": 4}).json()
    begun = job["request"]["config"]
    assert (begun["learning_rate"], begun["rank"]) == (1e-4, 4)
    job = submit(api, base_model=str(base), config={"learning_rate": 0.01}).json()
    assert job["request"]["config"]["learning_rate"] == 0.01


def test_a_job_is_queued_with_its_config_complete_and_its_base_pinned(api: Api) -> None:
    answer = submit(api, config={"rank": 4, "prior": {"num_images": 2}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["concept"]) == ("train", "queued", "rex")
    chosen = rare_words(resolve("pocket-64", api.settings).folder)[0]
    expected = LoraConfig(rank=4, prior=PriorConfig(num_images=2), trigger=chosen)
    assert job["request"]["config"] == expected.model_dump(mode="json")
    assert job["base_model"] == "pocket-64"
    assert len(job["base_fingerprint"]) == 64
    assert api.http.get(f"/v1/jobs/{job['id']}").json() == job


def test_a_concept_can_be_named(api: Api) -> None:
    assert submit(api, concept="my-rex").json()["concept"] == "my-rex"


def test_the_same_key_and_body_get_the_first_answer_and_one_job(api: Api) -> None:
    wanted = {"method": "lora", "subject_set": api.add_set()["id"]}
    headers = {"Idempotency-Key": "once"}
    first = api.http.post("/v1/jobs", json=wanted, headers=headers)
    again = api.http.post("/v1/jobs", json=wanted, headers=headers)
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(api.http.get("/v1/jobs").json()["items"]) == 1


def test_the_same_key_with_another_body_is_refused(api: Api) -> None:
    submit(api, key="once").raise_for_status()
    problem = problem_of(submit(api, key="once", config={"rank": 2}), 422)
    assert "another body" in problem["detail"]
    assert len(api.http.get("/v1/jobs").json()["items"]) == 1


def test_a_refused_request_does_not_use_up_its_key(api: Api) -> None:
    set_id = api.add_set()["id"]
    headers = {"Idempotency-Key": "once"}
    wrong = {"method": "lora", "subject_set": set_id, "config": {"rank": 0}}
    problem_of(api.http.post("/v1/jobs", json=wrong, headers=headers), 422)
    right = {"method": "lora", "subject_set": set_id}
    assert api.http.post("/v1/jobs", json=right, headers=headers).status_code == 202


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"rank": -4}, "config.rank"),
        ({"rank": "8"}, "config.rank"),
        ({"rank": True}, "config.rank"),
        ({"steps": -1}, "config.steps"),
        ({"steps": 1.5}, "config.steps"),
        ({"learning_rate": 0}, "config.learning_rate"),
        ({"rnak": 8}, "config.rnak"),
        ({"prior": {"num_images": 0}}, "config.prior.num_images"),
        ({"prior": {"sampler": "plms"}}, "config.prior.sampler"),
        ({"targets": ["to_q", "a b"]}, "config.targets[1]"),
        ({"prompt": "a" * 10_000}, "config.prompt"),
        ({"initializer": ""}, "config.initializer"),
        ({"initializer": " "}, "config.initializer"),
    ],
)
def test_a_wrong_config_value_is_named_by_its_path(
    api: Api, config: dict[str, Any], path: str
) -> None:
    assert paths_of(submit(api, config=config)) == [path]


def test_an_option_that_the_run_would_not_read_is_refused_unless_it_is_the_default(
    api: Api,
) -> None:
    config = {"token_learning_rate": 0.01, "prior": {"subject_set": "set_1", "steps": 30}}
    assert paths_of(submit(api, config=config)) == [
        "config.token_learning_rate",
        "config.prior.steps",
    ]
    config = {"prior": {"subject_set": api.add_set("dogs", 5)["id"]}}
    whole = submit(api, config=config).json()["request"]["config"]
    assert submit(api, config=whole).json()["request"]["config"] == whole


def test_spaces_around_an_initializer_are_no_part_of_it(api: Api) -> None:
    job = submit(api, config={"initializer": " dog ", "token_vectors": 1}).json()
    assert job["request"]["config"]["initializer"] == "dog"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"method": "magic"}, "method"),
        ({"method": 3}, "method"),
        ({"subject_set": "set_0000"}, "subject_set"),
        ({"subject_set": "../../etc"}, "subject_set"),
        ({"base_model": "no-such-base"}, "base_model"),
        ({"base_model": "/tmp"}, "base_model"),
        ({"base_model": "nul\x00"}, "base_model"),
        ({"concept": "Not A Name"}, "concept"),
        ({"config": []}, "config"),
        ({"config": {"prompt": "\ud800"}}, "config"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_request_leaves_no_job(api: Api, change: dict[str, Any], path: str) -> None:
    wanted: dict[str, Any] = {"method": "lora", "subject_set": api.add_set()["id"]}
    before = api.kept()
    body = json.dumps(wanted | change)  # in ASCII, so that a lone surrogate can be sent
    headers = {"Content-Type": "application/json", "Idempotency-Key": "once"}
    assert paths_of(api.http.post("/v1/jobs", content=body, headers=headers)) == [path]
    assert api.kept() == before


def test_jobs_are_listed_newest_first_filtered_and_paged(api: Api) -> None:
    made = [submit(api).json()["id"] for _ in range(3)]
    first = api.http.get("/v1/jobs?limit=2&kind=train").json()
    second = api.http.get(f"/v1/jobs?limit=2&cursor={first['next_cursor']}").json()
    assert [job["id"] for job in first["items"] + second["items"]] == made[::-1]
    assert api.http.get("/v1/jobs?state=succeeded").json()["items"] == []
    assert len(api.http.get("/v1/jobs?state=queued&method=lora").json()["items"]) == 3
    assert api.http.get("/v1/jobs?kind=generate").json()["items"] == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=9999", "cursor=%00", "cursor=x", "state=bored", "stat=queued"]
)
def test_a_wrong_filter_is_refused_rather_than_left_out(api: Api, query: str) -> None:
    problem_of(api.http.get(f"/v1/jobs?{query}"), 422)


def test_canceling_tells_what_came_of_it(api: Api) -> None:
    waiting, running = submit(api).json()["id"], submit(api).json()["id"]
    lease = leases.claim(api.context.db, running, "worker", 60)
    assert lease is not None
    canceled = api.http.post(f"/v1/jobs/{waiting}/cancel").json()
    assert (canceled["outcome"], canceled["job"]["state"]) == ("canceled", "canceled")
    requested = api.http.post(f"/v1/jobs/{running}/cancel").json()
    assert requested["outcome"] == "requested"
    assert requested["job"]["cancel_requested"] is True
    assert api.http.post(f"/v1/jobs/{waiting}/cancel").json()["outcome"] == "finished"


def test_attempts_tell_who_had_the_job(api: Api) -> None:
    job_id = submit(api).json()["id"]
    lease = leases.claim(api.context.db, job_id, "worker-1", 60)
    assert lease is not None
    leases.release(api.context.db, lease)
    [attempt] = api.http.get(f"/v1/jobs/{job_id}/attempts").json()["items"]
    assert (attempt["number"], attempt["worker"], attempt["outcome"]) == (1, "worker-1", "drained")


def test_progress_and_failure_show_in_the_job(api: Api) -> None:
    job_id = submit(api).json()["id"]
    lease = leases.claim(api.context.db, job_id, "worker-1", 60)
    assert lease is not None
    leases.progress(api.context.db, lease, {"step": 3, "total": 10, "loss": 0.5})
    assert api.http.get(f"/v1/jobs/{job_id}").json()["progress"]["step"] == 3
    leases.fail(api.context.db, lease, {"title": "The training run stopped", "detail": "NaN"})
    job = api.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["error"]["detail"]) == ("failed", "NaN")


def test_another_owners_job_is_not_there(api: Api) -> None:
    job_id = submit(api).json()["id"]
    with api.context.db.session() as session:
        row: Job = get(session, "local", job_id)
        row.owner = "somebody"
    for answer in (
        api.http.get(f"/v1/jobs/{job_id}"),
        api.http.get(f"/v1/jobs/{job_id}/events"),
        api.http.get(f"/v1/jobs/{job_id}/attempts"),
        api.http.post(f"/v1/jobs/{job_id}/cancel"),
        api.http.get(f"/v1/generations/{job_id}"),
    ):
        problem_of(answer, 404)
    assert api.http.get("/v1/jobs").json()["items"] == []


def test_a_dry_run_says_the_cost_and_queues_nothing(api: Api) -> None:
    wanted = {
        "method": "lora",
        "subject_set": api.add_set()["id"],
        "config": {"rank": 2, "steps": 10, "batch_size": 4},
    }
    answer = api.http.post("/v1/jobs", params={"dry_run": "true"}, json=wanted)
    assert answer.status_code == 200
    cost = answer.json()
    assert (cost["steps"], cost["samples"]) == (10, 40)
    assert cost["adapter_bytes"] == 4 * cost["trainable_parameters"] > 0
    assert cost["seconds"] is None  # nothing has been trained here yet
    assert api.http.get("/v1/jobs").json()["items"] == []


def test_the_cost_counts_what_options_keep_in_memory(api: Api) -> None:
    subject_set = api.add_set()["id"]

    def cost(**config: Any) -> Any:
        wanted = {"method": "lora", "subject_set": subject_set, "config": config}
        return api.http.post("/v1/jobs", params={"dry_run": "true"}, json=wanted).json()

    plain = cost()
    trained = plain["trainable_parameters"]
    unet = plain["state_bytes"] - 16 * trained  # weight, gradient and two moments, 4 bytes each
    assert cost(ema_decay=0.9)["state_bytes"] == plain["state_bytes"] + 4 * trained
    assert cost(optimizer="adamw8bit")["state_bytes"] == plain["state_bytes"] - 6 * trained
    preserving = cost(output_preservation={})
    assert preserving["state_bytes"] == plain["state_bytes"] + unet
    assert preserving["samples"] == 2 * plain["samples"]


def test_the_cost_counts_every_subject_s_word_and_every_class_s_images(api: Api) -> None:
    own = api.add_set()["id"]
    others = [api.add_set("tom", 4, "cat")["id"], api.add_set("fido", 4)["id"]]

    def cost(*also: str) -> Any:
        config = {"also": also, "prior": {"num_images": 5}}
        wanted = {"method": "custom_diffusion", "subject_set": own, "config": config}
        return api.http.post("/v1/jobs", params={"dry_run": "true"}, json=wanted).json()

    one, two, three = cost(), cost(others[0]), cost(*others)
    assert [each["prior_images"] for each in (one, two, three)] == [5, 10, 10]
    word = two["trainable_parameters"] - one["trainable_parameters"]
    assert word > 0
    assert three["adapter_bytes"] == one["adapter_bytes"] + 2 * word * 4


def test_the_cost_counts_svdiff_s_factors(api: Api) -> None:
    subject_set = api.add_set()["id"]

    def frozen(method: str, **config: Any) -> int:
        """Bytes of what does not train."""
        wanted = {"method": method, "subject_set": subject_set, "config": config}
        cost = api.http.post("/v1/jobs", params={"dry_run": "true"}, json=wanted).json()
        return int(cost["state_bytes"] - 16 * cost["trainable_parameters"])

    unet = frozen("lora")
    without_products = frozen("svdiff", gradient_checkpointing=True)
    assert 2 * unet < without_products < frozen("svdiff") - 0.9 * unet


def test_targets_the_base_does_not_have_are_refused_by_name(api: Api) -> None:
    assert paths_of(submit(api, config={"targets": ["to_z"]})) == ["config.targets"]
    assert api.http.get("/v1/jobs").json()["items"] == []


def test_a_rank_that_the_base_has_no_room_for_is_refused(api: Api) -> None:
    refused = submit(api, method="t_lora", config={"rank": 200})
    assert paths_of(refused) == ["config.rank"]


def test_photos_that_could_only_be_squares_are_not_put_into_buckets(
    api: Api, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "deep")
    file = base / "unet" / "config.json"
    file.write_text(
        file.read_text().replace('"block_out_channels": [', '"block_out_channels": [8, 8, 8,')
    )
    config = {"aspect_buckets": True}
    refused = submit(api, base_model=str(base), config=config)
    assert paths_of(refused) == ["config.aspect_buckets"]
    assert submit(api, base_model=str(base), config={**config, "resolution": 96}).is_success
    assert submit(api, config=config).is_success


def test_the_user_s_own_class_images_are_another_subject_set(api: Api) -> None:
    photos, of_class = api.add_set(), api.add_set("dogs", 5)
    prior = {"subject_set": of_class["id"]}
    job = submit(api, subject_set=photos["id"], config={"prior": prior}).json()
    context = api.context
    work = assignment(context.db, job["id"])
    told = run_request(work, context.blobs, api.settings)
    accepted = [image["sha256"] for image in of_class["images"]]
    assert [image.sha256 for image in told.class_images] == accepted
    assert [image.sha256 for image in told.images] == accepted[:3]
    assert all(image.path.is_file() for image in told.class_images)

    problem_of(api.http.delete(f"/v1/subject-sets/{of_class['id']}"), 409)
    preview = api.http.post(
        "/v1/jobs",
        params={"dry_run": "true"},
        json={"method": "lora", "subject_set": photos["id"], "config": {"prior": prior}},
    ).json()
    assert preview["prior_images"] == 0


def test_custom_diffusion_learns_more_subjects_of_sets_it_is_told(api: Api) -> None:
    photos, other = api.add_set(), api.add_set("tom", 4)
    config = {"also": [other["id"]]}
    job = submit(api, subject_set=photos["id"], method="custom_diffusion", config=config).json()
    work = assignment(api.context.db, job["id"])
    told = run_request(work, api.context.blobs, api.settings)
    (second,) = told.also
    assert second.class_noun == other["class_noun"]
    assert [image.sha256 for image in second.images] == [i["sha256"] for i in other["images"]]
    assert told.config["initializer"] == rare_words(told.base_folder)[0]
    problem_of(api.http.delete(f"/v1/subject-sets/{other['id']}"), 409)

    refused = submit(api, method="custom_diffusion", config={"also": ["set_0000"]})
    assert paths_of(refused) == ["config.also[0]"]


def test_a_set_has_one_part_in_a_run(api: Api) -> None:
    own, other = (api.add_set(name)["id"] for name in ("rex", "tom"))

    def refused(method: str, **config: Any) -> list[str]:
        return paths_of(submit(api, subject_set=own, method=method, config=config))

    assert refused("custom_diffusion", also=[other, own]) == ["config.also[1]"]
    assert refused("custom_diffusion", also=[other, other]) == ["config.also[1]"]
    assert refused("lora", prior={"subject_set": own}) == ["config.prior.subject_set"]
    assert refused("custom_diffusion", also=[other], prior={"subject_set": other}) == [
        "config.prior.subject_set"
    ]


@pytest.mark.parametrize("kind", ["subject_set", "prompt"])
def test_a_prior_of_one_class_is_refused_for_subjects_of_several(api: Api, kind: str) -> None:
    prior = {kind: api.add_set("dogs", 5)["id"] if kind == "subject_set" else "a photo of a dog"}

    def answer(class_noun: str) -> Any:
        config = {"also": [api.add_set("tom", 4, class_noun)["id"]], "prior": prior}
        return submit(api, method="custom_diffusion", config=config)

    (problem,) = problem_of(answer("cat"), 422)["errors"]
    assert problem["path"] == f"config.prior.{kind}"
    assert "(cat, dog): leave it out, and the base draws" in problem["message"]
    assert answer("dog").status_code == 202


def test_a_set_of_class_images_that_is_not_there_is_named_by_its_field(api: Api) -> None:
    refused = submit(api, config={"prior": {"subject_set": "set_0000"}})
    assert paths_of(refused) == ["config.prior.subject_set"]


def test_each_concept_answers_to_a_rare_word_of_its_own(api: Api) -> None:
    """Whether the others are there already or only in training; those of other owners are not."""
    first, second, third, *rest = rare_words(resolve("pocket-64", api.settings).folder)
    api.add_version("kim", trigger=first)
    api.add_version("other", trigger=third, owner="somebody")

    def trigger_of(concept: str) -> str:
        trigger: str = submit(api, concept=concept).json()["request"]["config"]["trigger"]
        return trigger

    assert [trigger_of(name) for name in ("rex", "rex", "tom", "kim")] == [
        second,
        second,
        third,
        first,
    ]
    for number, word in enumerate(rest):
        api.add_version(f"more-{number}", trigger=word)
    # All are taken: rex and kim count twice, so the first that only one concept has is tom's.
    assert trigger_of("one-more") == third


def test_a_subject_answers_to_a_rare_word_of_the_base_unless_told_otherwise(api: Api) -> None:
    rarest = rare_words(resolve("pocket-64", api.settings).folder)[0]
    for config in ({}, {"trigger": None}):
        assert submit(api, config=config).json()["request"]["config"]["trigger"] == rarest
    asked = {"method": "lora", "subject_set": api.add_set()["id"]}
    shown = api.http.post("/v1/jobs", params={"dry_run": "true"}, json=asked).json()
    assert shown["trigger"] == rarest
    own = submit(api, config={"trigger": "zwx", "prompt": "a zwx dog"}).json()
    assert own["request"]["config"]["trigger"] == "zwx"
    refused = submit(api, config={"prompt": "a sks dog"})
    assert "write {trigger}" in str(problem_of(refused, 422))
