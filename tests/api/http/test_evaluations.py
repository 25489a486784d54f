"""Evaluations as far as the API decides them; they are carried out in tests/trainers."""

from typing import Any

import pytest

from lookalike_platform.errors import Conflict
from lookalike_platform.jobs import lease as leases
from lookalike_registry import versions
from support_api import Api, paths_of, problem_of

FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}


def ask(api: Api, **wanted: Any) -> Any:
    return api.http.post("/v1/evaluations", json={"adapter": "rex", **wanted})


def finish(api: Api, evaluation_id: str) -> None:
    """Do the worker's part."""
    lease = leases.claim(api.context.db, evaluation_id, "worker", 60)
    assert lease is not None
    leases.advance(api.context.db, lease, "evaluating")
    figures = {"subject_fidelity": {"dino": FIGURE}, "prompt_fidelity": {"clip": FIGURE}}
    leases.succeed(api.context.db, lease, {"figures": figures, "seconds": 1.5})


def test_an_evaluation_pins_its_version_and_ends_with_figures(api: Api) -> None:
    version = api.add_version("rex")
    set_id = api.add_set()["id"]
    answer = ask(api, adapter="rex@candidate", subject_set=set_id, prompts=["a {subject}"])
    assert answer.status_code == 202
    made = answer.json()
    assert answer.headers["location"] == f"/v1/evaluations/{made['id']}"
    assert (made["state"], made["adapter"], made["digest"]) == ("queued", "rex@1", version.digest)
    assert made["options"]["prompts"] == ["a {subject}"]
    assert made["figures"] is None
    job = api.http.get(f"/v1/jobs/{made['id']}").json()
    assert (job["kind"], job["request"]["called"]) == ("evaluate", "sks dog")

    finish(api, made["id"])
    with api.client as client:
        done = client.evaluation(made["id"])
    assert done["state"] == "succeeded"
    assert done["figures"]["subject_fidelity"] == {"dino": FIGURE}
    assert done["seconds"] == 1.5


def test_the_photos_it_learned_from_are_taken_unless_others_are_named(api: Api) -> None:
    api.add_version("rex")  # of a subject set that is gone
    assert paths_of(ask(api)) == ["subject_set"]
    assert ask(api, subject_set=api.add_set()["id"]).status_code == 202


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"adapter": "nobody"}, "adapter"),
        ({"subject_set": "set_0"}, "subject_set"),
        ({"prompts": ["a dog"]}, "prompts[0]"),
        ({"prompts": ["a {subject} {0}"]}, "prompts[0]"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"images": 3}, "images"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_with_its_field(
    api: Api, wanted: dict[str, Any], path: str
) -> None:
    api.add_version("rex")
    assert paths_of(ask(api, **{"subject_set": api.add_set()["id"], **wanted})) == [path]


def test_a_version_without_photos_of_its_own_asks_for_some(api: Api) -> None:
    """As merged and imported ones are."""
    version = api.add_version("rex")
    with api.context.db.session() as session:
        row = session.get_one(type(version), version.id)
        row.manifest = row.manifest | {"lineage": row.manifest["lineage"] | {"subject_set": ""}}
    (problem,) = problem_of(ask(api), 422)["errors"]
    assert problem["path"] == "subject_set"
    assert "Name those of rex" in problem["message"]
    assert ask(api, subject_set=api.add_set()["id"]).status_code == 202


def test_a_version_of_another_base_is_refused(api: Api) -> None:
    version = api.add_version("rex")
    with api.context.db.session() as session:
        session.merge(version).base_fingerprint = "0" * 64
    assert paths_of(ask(api, subject_set=api.add_set()["id"])) == ["adapter"]


def test_other_jobs_are_no_evaluations(api: Api) -> None:
    made = api.http.post("/v1/generations", json={"prompt": "a dog"}).json()
    problem_of(api.http.get(f"/v1/evaluations/{made['id']}"), 404)


def test_a_version_that_is_being_evaluated_cannot_be_deleted(api: Api) -> None:
    api.add_version("rex", aliases=())
    made = ask(api, adapter="rex@1", subject_set=api.add_set()["id"]).json()
    context = api.context
    with pytest.raises(Conflict, match=made["id"]):
        versions.delete_version(context.db, context.blobs, api.settings, "local", "rex", 1)
