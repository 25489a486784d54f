"""Merges as far as the API decides them; they are carried out in tests/trainers/composition."""

from pathlib import Path
from typing import Any

import pytest

from lookalike_platform import bases
from lookalike_platform.errors import Conflict
from lookalike_registry import versions
from lookalike_registry.compose import rules
from support_api import Api, paths_of, problem_of
from support_sampling import save_adapter

DUO = [{"ref": "rex"}, {"ref": "tom@1", "scale": 0.5}]


@pytest.fixture
def adapters(api: Api) -> Api:
    """rex and tom, which are LoRAs, and one adapter of some other methods under its name."""
    api.add_version("rex")
    api.add_version("tom", trigger="zwx")
    for method in ("t-lora", "dreambooth", "custom-diffusion"):
        api.add_version(method, method=method.replace("-", "_"), trigger=method)
    return api


def ask(api: Api, **wanted: Any) -> Any:
    return api.http.post("/v1/compositions", json={"name": "duo", "parents": DUO, **wanted})


def test_a_merge_is_queued_with_its_parents_pinned(adapters: Api) -> None:
    answer = ask(adapters)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["concept"]) == ("compose", "queued", "duo")
    assert job["request"]["strategy"] == "ssr"
    parents = job["request"]["adapters"]
    assert [(p["ref"], p["scale"]) for p in parents] == [("rex@1", 1.0), ("tom@1", 0.5)]
    adapters.add_version("rex")
    again = adapters.http.get(f"/v1/jobs/{job['id']}").json()
    assert again["request"]["adapters"] == parents


def test_one_key_queues_one_merge(adapters: Api) -> None:
    with adapters.client as client:
        first = client.compose("duo", ["rex", "tom"], strategy="svd", idempotency_key="k")
        assert client.compose("duo", ["rex", "tom"], strategy="svd", idempotency_key="k") == first


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        ({"parents": DUO[:1]}, ["parents"]),
        ({"parents": [{"ref": "rex"}, {"ref": "nobody"}]}, ["parents[1].ref"]),
        ({"parents": [{"ref": "rex"}, {"ref": "rex@1"}]}, ["parents[1].ref"]),
        ({"parents": [{"ref": "rex"}, {"ref": "t-lora"}]}, ["parents[1].ref"]),
        ({"name": "rex"}, ["name"]),
        ({"name": "../x"}, ["name"]),
        ({"strategy": "magic"}, ["strategy"]),
        ({"strategy": "closed_form"}, ["strategy"]),
        ({"strategy": "ties", "options": {"density": 0}}, ["options.density"]),
        ({"strategy": "svd", "options": {"density": 0.5}}, ["options.density"]),
        ({"options": {"rank": 4, "density": 0.5}}, ["options.density", "options.rank"]),
        (
            {"parents": [{"ref": "rex"}, {"ref": "dreambooth"}], "strategy": "svd"},
            ["options.rank"],
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_with_its_fields(
    adapters: Api, wanted: dict[str, Any], paths: list[str]
) -> None:
    before = adapters.kept()["jobs"]
    assert paths_of(ask(adapters, **wanted)) == paths
    assert adapters.kept()["jobs"] == before


def test_a_strategy_that_does_not_fit_is_told_with_those_that_do(adapters: Api) -> None:
    parents = [{"ref": "rex"}, {"ref": "custom-diffusion"}]
    [problem] = problem_of(ask(adapters, parents=parents, strategy="ssr"), 422)["errors"]
    assert "ssr does not take custom_diffusion" in problem["message"]
    assert "weighted_sum, svd, ties, dare_linear" in problem["message"]


def test_parents_of_two_bases_are_refused(adapters: Api) -> None:
    version = adapters.add_version("kim", trigger="qqx")
    with adapters.context.db.session() as session:
        session.merge(version).base_fingerprint = "0" * 64
    assert paths_of(ask(adapters, parents=[*DUO, {"ref": "kim"}])) == ["parents[2].ref"]


def test_subjects_that_prompts_call_the_same_are_refused(api: Api) -> None:
    api.add_version("rex")
    api.add_version("tom")
    [problem] = problem_of(ask(api), 422)["errors"]
    assert problem["path"] == "parents[1].ref"
    assert "tom and rex are both called 'sks dog'" in problem["message"]
    api.add_version("tom", prompting={"class_noun": "cat"})
    assert ask(api, parents=[{"ref": "rex"}, {"ref": "tom@2"}]).status_code == 202


def test_dora_is_known_from_its_file(adapters: Api, tmp_path: Path) -> None:
    dora = tmp_path / "dora.safetensors"
    save_adapter(dora, bases.resolve("pocket-64", adapters.settings).folder, dora=True)
    adapters.add_version("kim", weights=dora, trigger="qqx")
    parents = [{"ref": "rex"}, {"ref": "kim"}]
    assert ask(adapters, parents=parents).json()["request"]["strategy"] == "weighted_sum"
    assert paths_of(ask(adapters, parents=parents, strategy="ssr")) == ["strategy"]


def test_a_version_that_is_being_merged_cannot_be_deleted(api: Api) -> None:
    api.add_version("rex", aliases=())
    api.add_version("tom", trigger="zwx")
    job = ask(api, parents=[{"ref": "rex@1"}, {"ref": "tom"}]).json()
    context = api.context
    with pytest.raises(Conflict, match=job["id"]):
        versions.delete_version(context.db, context.blobs, api.settings, "local", "rex", 1)


def test_the_rules_are_published(api: Api) -> None:
    found = api.http.get("/v1/compositions/rules").json()
    assert found["kinds"] == list(rules.KINDS)
    assert len(found["combinations"]) == len(rules.table())
    assert {one["name"] for one in found["strategies"]} == {one.name for one in rules.STRATEGIES}
