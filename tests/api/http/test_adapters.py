import io
import json
import zipfile
from pathlib import Path

import pytest

from lookalike_api.client import Client
from lookalike_platform.files import sha256_bytes
from lookalike_platform.ids import new_id
from lookalike_registry.register import register
from lookalike_registry.safetensors_header import read_header
from support_api import Api, problem_of
from support_registry import METRICS, finished_run, manifest_of

WEIGHTS = "pytorch_lora_weights.safetensors"


def test_adapters_are_listed_with_versions_and_aliases(api: Api) -> None:
    for _ in range(2):
        api.add_version("rex")
    api.add_version("tom", aliases=())
    page = api.http.get("/v1/adapters").json()
    assert page["items"] == [
        {
            "name": "rex",
            "versions": 2,
            "latest_version": 2,
            "default_version": 2,
            "aliases": {"candidate": 2},
        },
        {
            "name": "tom",
            "versions": 1,
            "latest_version": 1,
            "default_version": None,
            "aliases": {},
        },
    ]
    first = api.http.get("/v1/adapters?limit=1").json()
    rest = api.http.get(f"/v1/adapters?cursor={first['next_cursor']}").json()
    assert [one["name"] for one in first["items"] + rest["items"]] == ["rex", "tom"]
    assert api.http.get("/v1/adapters/rex").json() == page["items"][0]


def test_a_version_is_found_by_number_and_by_alias(api: Api) -> None:
    for _ in range(2):
        api.add_version("rex")
    second, first = api.http.get("/v1/adapters/rex/versions").json()["items"]
    assert (first["ref"], second["aliases"]) == ("rex@1", ["candidate"])
    assert second["manifest"]["prompting"]["class_noun"] == "dog"
    assert api.http.get("/v1/adapters/rex/versions/candidate").json() == second
    assert api.http.get("/v1/adapters/rex/versions/1").json() == first


def test_files_are_downloaded_one_by_one_or_as_a_zip(api: Api) -> None:
    version = api.add_version("rex")
    at = "/v1/adapters/rex/versions/1"
    assert api.http.get(at).json()["files"] == [WEIGHTS, "samples.png", "manifest.json"]
    weights = api.http.get(f"{at}/files/{WEIGHTS}")
    assert sha256_bytes(weights.content) == version.digest
    assert WEIGHTS in weights.headers["content-disposition"]
    assert json.loads(api.http.get(f"{at}/files/manifest.json").content) == version.manifest
    answer = api.http.get(f"{at}/archive")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["manifest.json", WEIGHTS, "samples.png"]
        assert archive.read(WEIGHTS) == weights.content
    problem = problem_of(api.http.get(f"{at}/files/secret.txt"), 404)
    assert "manifest.json" in problem["detail"]


def test_a_version_is_exported_for_other_programs(api: Api, tmp_path: Path) -> None:
    api.add_version("rex")
    with Client(api.url) as look:
        (made,), left_out = look.export("rex", "kohya", tmp_path)
    assert (made.name, left_out) == ("teapot.safetensors", 0.0)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    sides = ("alpha", "lora_down.weight", "lora_up.weight")
    assert sorted(read_header(made).tensors) == [f"{module}.{side}" for side in sides]
    at = "/v1/adapters/rex/versions/1/export"
    problem_of(api.http.get(f"{at}?format=gguf"), 422)
    assert "whole model" in problem_of(api.http.get(f"{at}?format=model"), 501)["detail"]


@pytest.mark.parametrize(
    "place",
    [
        "/v1/adapters/nobody",
        "/v1/adapters/nobody/versions",
        "/v1/adapters/rex/versions/9",
        "/v1/adapters/rex/versions/production",
        "/v1/adapters/rex/versions/9/archive",
        "/v1/adapters/rex/versions/1/files/..%2f..%2fetc",
    ],
)
def test_what_is_not_there_is_404(api: Api, place: str) -> None:
    api.add_version("rex")
    problem_of(api.http.get(place), 404)


def test_another_owners_adapter_is_not_there(api: Api) -> None:
    api.add_version("rex", owner="somebody")
    assert api.http.get("/v1/adapters").json()["items"] == []
    for place in ("rex", "rex/versions", "rex/versions/1", f"rex/versions/1/files/{WEIGHTS}"):
        problem_of(api.http.get(f"/v1/adapters/{place}"), 404)
    problem_of(api.http.put("/v1/adapters/rex/aliases/production", json={"version": 1}), 404)
    problem_of(api.http.delete("/v1/adapters/rex/versions/1"), 404)


def test_an_alias_moves_and_production_protects_from_deletion(api: Api) -> None:
    # A name of its own: the home is shared, and MLflow counts on from the versions of other tests.
    for seed in range(2):
        job_id = new_id("job")
        files = finished_run(api.settings.home / job_id, seed)
        manifest = manifest_of(files, job_id, concept="robin")
        context = api.context
        register(context.db, context.blobs, api.settings, manifest, files, METRICS)
    pointed = api.http.put("/v1/adapters/robin/aliases/production", json={"version": 1})
    assert pointed.status_code == 200, pointed.text
    assert pointed.json()["aliases"] == ["production"]
    assert api.http.get("/v1/adapters/robin").json()["default_version"] == 1
    assert (
        "production" in problem_of(api.http.delete("/v1/adapters/robin/versions/1"), 409)["detail"]
    )
    assert api.http.delete("/v1/adapters/robin/versions/2").status_code == 204
    problem_of(api.http.get("/v1/adapters/robin/versions/2"), 404)
    assert api.http.get("/v1/adapters/robin").json()["aliases"] == {"production": 1}
    for wrong in ({"version": "1"}, {"version": 0}, {}, {"version": 1, "more": 2}):
        problem_of(api.http.put("/v1/adapters/robin/aliases/production", json=wrong), 422)
    problem_of(api.http.put("/v1/adapters/robin/aliases/v3", json={"version": 1}), 422)
    problem_of(api.http.put("/v1/adapters/robin/aliases/mine", json={"version": 7}), 404)


def test_the_client_downloads_by_reference(
    api: Api, tmp_path_factory: pytest.TempPathFactory
) -> None:
    version = api.add_version("rex")
    folder = tmp_path_factory.mktemp("download")
    with Client(api.url) as look:
        saved = look.download("rex", folder)
    assert [path.name for path in saved] == [WEIGHTS, "samples.png", "manifest.json"]
    assert sha256_bytes(saved[0].read_bytes()) == version.digest
