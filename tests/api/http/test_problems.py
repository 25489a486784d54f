"""Errors that are nobody's resource, and the document that describes them all."""

from typing import Any

import pytest

from lookalike_trainers.catalog import METHODS
from support_api import Api, problem_of


@pytest.mark.parametrize("place", ["/", "/v1/nothing", "/docs", "/v1/jobs/job_0/nothing"])
def test_what_is_not_there_is_a_problem(api: Api, place: str) -> None:
    assert "/openapi.json" in problem_of(api.http.get(place), 404)["detail"]


def test_a_wrong_method_says_which_ones_there_are(api: Api) -> None:
    answer = api.http.delete("/v1/jobs")
    assert "GET, POST" in problem_of(answer, 405)["detail"]
    assert answer.headers["allow"] == "GET, POST"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "JSON"),
        (b"", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"prompt": "\xff"}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "body"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale"),
        (b'{"prompt": "\\ud800"}', "prompt"),
    ],
)
def test_a_body_that_is_no_request_is_a_problem(api: Api, body: bytes, said: str) -> None:
    before = api.kept()
    headers = {"Content-Type": "application/json"}
    answer = api.http.post("/v1/generations", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert said in str(problem_of(answer, answer.status_code))
    assert api.kept() == before


@pytest.mark.parametrize("place", ["jobs/%00", "jobs/..", "subject-sets/%ff", "adapters/%0a"])
def test_ids_that_are_none_are_refused_before_any_look_up(api: Api, place: str) -> None:
    answer = api.http.get(f"/v1/{place}")
    assert answer.status_code in (404, 422)
    problem_of(answer, answer.status_code)


@pytest.mark.parametrize("key", ["", "a b", "ü".encode(), "x" * 256])
def test_an_idempotency_key_that_is_none_is_refused(api: Api, key: str | bytes) -> None:
    headers: Any = {"Idempotency-Key": key}
    answer = api.http.post("/v1/generations", json={"prompt": "a dog"}, headers=headers)
    [error] = problem_of(answer, 422)["errors"]
    assert error["path"] == "Idempotency-Key"


def test_a_defect_is_a_problem_too_and_says_nothing_of_the_inside(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("lookalike_platform.jobs.store.list_jobs", break_down)
    assert "secret" not in str(problem_of(api.http.get("/v1/jobs"), 500))


def test_the_document_describes_every_route_and_its_problems(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    refs = set(_refs(document))
    assert refs
    assert {ref.rpartition("/")[2] for ref in refs} <= schemas.keys()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert list(response["content"]) == ["application/problem+json"], (path, method)
            takes_input = "parameters" in operation or "requestBody" in operation
            assert takes_input == ("422" in operation["responses"]), (path, method)


def test_the_document_has_each_methods_config(api: Api) -> None:
    schemas = api.http.get("/openapi.json").json()["components"]["schemas"]
    config = schemas["JobRequest"]["properties"]["config"]
    names = [ref["$ref"].rpartition("/")[2] for ref in config["anyOf"]]
    assert names == [method.config.__name__ for method in METHODS]
    assert schemas[names[0]]["properties"]["rank"]["minimum"] == 1


def _refs(node: Any) -> Any:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)
