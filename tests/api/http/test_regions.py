"""Regions of a generation as far as the API decides them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lookalike_api.sampling.requests import GenerateJob, GenerationRequest
from lookalike_platform import bases
from lookalike_platform.db.tables import Job
from lookalike_registry.manifest import SubjectRecord
from support_api import Api, paths_of, problem_of
from support_images import encoded, picture
from support_models import save_base
from support_sampling import save_adapter

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
PLAIN = {"prompt": "a cat", "box": LEFT}
LEARNED = SubjectRecord(
    name="rex", trigger="sks", class_noun="dog", phrase="{trigger} {class_noun}", learned=True
)


def ask(api: Api, *regions: Any, **wanted: Any) -> Any:
    body = {"prompt": "a room", "regions": list(regions), **wanted}
    return api.http.post("/v1/generations", json=body)


def upload(api: Api, size: tuple[int, int] = (64, 64)) -> str:
    photo = encoded(picture(0, size), "PNG")
    made = api.http.post("/v1/images", files={"image": ("mask.png", photo, "image/png")})
    return str(made.json()["id"])


def test_a_region_has_its_references_pinned_and_its_prompt_bound(api: Api) -> None:
    rex = api.add_version("rex")
    api.add_version("tom", trigger="zwx")
    mask = upload(api)
    adapters = [{"ref": "tom", "scale": 0.5}]
    made = ask(
        api,
        {"prompt": "<tom> sits", "adapters": adapters, "box": LEFT},
        {"prompt": "<rex>", "adapters": [{"ref": "rex"}], "mask_image": mask},
        adapters=[{"ref": "rex"}],
        prompt="a <rex>",
    ).json()
    first, second = made["regions"]
    assert (made["bound_prompt"], first["bound_prompt"]) == ("a sks dog", "zwx dog sits")
    assert (made["compose"], first["box"], first["mask_image"]) == ("attention", LEFT, None)
    assert [(v["ref"], v["scale"]) for v in first["versions"]] == [("tom@1", 0.5)]
    assert (second["versions"][0]["digest"], second["mask_image"]["id"]) == (rex.digest, mask)
    assert made["warnings"] == []


def negatives_of(api: Api, answer: Any) -> list[str | None]:
    """As they are read: of what no region covers, then of each region."""
    assert answer.status_code == 202, answer.text
    with api.context.db.read_session() as session:
        job = GenerateJob.model_validate(session.get_one(Job, answer.json()["id"]).request)
    return [job.bound_negative, *(region.bound_negative for region in job.regions)]


@pytest.mark.parametrize("negative", ["<rex>, blurry", "two of <rex>"])
def test_a_negative_prompt_has_a_subjects_word_where_it_acts_and_its_class_elsewhere(
    api: Api, negative: str
) -> None:
    learned = {"subjects": [LEARNED]}
    rex = api.add_version("rex", method="textual_inversion", prompting=learned)
    uses = {"adapters": [{"ref": "rex"}]}
    here, there = negative.replace("<rex>", f"{rex.id} dog"), negative.replace("<rex>", "dog")
    in_region = ask(api, {**PLAIN, **uses}, {**PLAIN, "box": RIGHT}, negative_prompt=negative)
    assert negatives_of(api, in_region) == [there, here, there]
    outside = ask(api, PLAIN, negative_prompt=negative, **uses)
    assert negatives_of(api, outside) == [here, there]


def test_a_bare_trigger_in_a_negative_prompt_is_the_learned_word_where_it_acts(api: Api) -> None:
    rex = api.add_version("rex", method="textual_inversion", prompting={"subjects": [LEARNED]})
    region = {**PLAIN, "adapters": [{"ref": "rex"}]}
    made = ask(api, region, negative_prompt="a sks dog")
    assert negatives_of(api, made) == ["a sks dog", f"a {rex.id} dog"]


def test_a_negative_prompt_names_subjects_of_this_request_alone(api: Api) -> None:
    api.add_version("rex")
    api.add_version("tom")
    region = {**PLAIN, "adapters": [{"ref": "rex"}]}
    [problem] = problem_of(ask(api, region, negative_prompt="<tom>"), 422)["errors"]
    assert problem["path"] == "negative_prompt"
    assert "<rex>" in problem["message"]


def test_the_parameters_of_a_picture_ask_for_the_same_regions(api: Api) -> None:
    api.add_version("rex")
    regions = [
        {"prompt": "<rex>", "adapters": [{"ref": "rex@candidate", "scale": 0.9}], "box": RIGHT},
        {"prompt": "a cat", "mask_image": upload(api)},
    ]
    made = ask(api, *regions, compose="latents").json()
    with api.context.db.read_session() as session:
        job = GenerateJob.model_validate(session.get_one(Job, made["id"]).request)
    kept = json.loads(job.parameters(0, "x"))
    again = GenerationRequest.model_validate(kept["request"])
    assert (again.compose, again.regions[0].adapters[0].ref) == ("latents", "rex@1")
    repeated = api.http.post("/v1/generations", json=kept["request"]).json()
    asked = [{**version, "asked": "rex@1"} for version in made["regions"][0]["versions"]]
    assert repeated["regions"] == [{**made["regions"][0], "versions": asked}, made["regions"][1]]


def test_a_warning_says_which_region_it_is_about(api: Api) -> None:
    api.add_version("rex")
    [warning] = ask(api, {**PLAIN, "adapters": [{"ref": "rex"}]}).json()["warnings"]
    assert warning.startswith("regions[0]: The prompt does not mention rex")


@pytest.mark.parametrize(
    ("region", "path"),
    [
        ({"box": LEFT}, "regions[0].prompt"),
        ({"prompt": "", "box": LEFT}, "regions[0].prompt"),
        ({"prompt": "a" * 10_000, "box": LEFT}, "regions[0].prompt"),
        ({"prompt": "<tom>", "box": LEFT}, "regions[0].prompt"),
        ({"prompt": "a"}, "regions[0]"),
        ({"prompt": "a", "box": LEFT, "mask_image": "img_1"}, "regions[0]"),
        ({"prompt": "a", "box": [0, 0, 1]}, "regions[0].box"),
        ({"prompt": "a", "box": [0.5, 0, 0.5, 1]}, "regions[0].box"),
        ({"prompt": "a", "box": [0, 0, 1.5, 1]}, "regions[0].box"),
        ({"prompt": "a", "box": [0, 0, 0.01, 1]}, "regions[0]"),
        ({"prompt": "a", "mask_image": "img_nothing"}, "regions[0].mask_image"),
        ({"prompt": "a", "mask_image": "WIDE"}, "regions[0].mask_image"),
        ({"prompt": "a", "box": LEFT, "seed": 1}, "regions[0].seed"),
        ({**PLAIN, "adapters": [{"ref": "nobody"}]}, "regions[0].adapters[0].ref"),
        ({**PLAIN, "adapters": [{"ref": "rex"}, {"ref": "rex@1"}]}, "regions[0].adapters"),
        ({**PLAIN, "adapters": [{"ref": "far"}]}, "regions[0].adapters[0].ref"),
        ({**PLAIN, "adapters": [{"ref": "kim"}]}, "regions[0].adapters[0].ref"),
    ],
)
def test_a_region_that_cannot_be_painted_is_refused_by_its_field(
    api: Api, tmp_path: Path, region: dict[str, Any], path: str
) -> None:
    api.add_version("rex")
    api.add_version("kim", method="dreambooth")
    api.add_version("far", base=str(save_base(tmp_path / "base")))
    known = {"WIDE": upload(api, (128, 64))}
    named = {field: known.get(str(value), value) for field, value in region.items()}
    before = api.kept()
    assert paths_of(ask(api, named, adapters=[{"ref": "rex"}])) == [path]
    assert api.kept() == before


def test_a_region_that_later_ones_cover_is_refused_with_what_to_do(api: Api) -> None:
    over = {"prompt": "a dog", "box": [0, 0, 1, 1]}
    [problem] = problem_of(ask(api, PLAIN, over), 422)["errors"]
    assert problem["path"] == "regions[0]"
    assert "put it after them" in problem["message"]
    assert ask(api, over, PLAIN).status_code == 202


def test_how_regions_compose_belongs_to_regions(api: Api) -> None:
    assert paths_of(ask(api, compose="latents")) == ["compose"]
    assert paths_of(ask(api, PLAIN, compose="sum")) == ["compose"]
    assert paths_of(ask(api, *[PLAIN] * 13)) == ["regions"]


def test_what_changes_the_base_as_a_whole_is_refused_with_the_other_way(
    api: Api, tmp_path: Path
) -> None:
    """Also outside of all regions, for it would act within them."""
    dora = tmp_path / "dora.safetensors"
    save_adapter(dora, bases.resolve("pocket-64", api.settings).folder, dora=True)
    api.add_version("rex", weights=dora)
    api.add_version("tom", method="dreambooth")
    rex, tom = [{"ref": "rex"}], [{"ref": "tom"}]
    answer = ask(api, {**PLAIN, "adapters": tom}, adapters=rex)
    problems = problem_of(answer, 422)["errors"]
    paths = ["adapters[0].ref", "regions[0].adapters[0].ref"]
    assert [problem["path"] for problem in problems] == paths
    assert all('"compose": "latents"' in problem["message"] for problem in problems)
    answer = ask(api, {**PLAIN, "adapters": tom}, adapters=rex, compose="latents")
    assert answer.status_code == 202
    together = problem_of(ask(api, {**PLAIN, "adapters": [*rex, *tom]}, compose="latents"), 422)
    assert '"compose": "latents"' in together["detail"]


def test_a_merged_version_is_let_through_for_its_file_tells_where_it_can_act(api: Api) -> None:
    """The sampler looks: tests/api/sampling/test_regions.py."""
    api.add_version("duo", method="composition")
    assert ask(api, {**PLAIN, "adapters": [{"ref": "duo"}]}).status_code == 202


def test_what_regions_need_is_not_deleted_before_they_are_painted(api: Api) -> None:
    api.add_version("rex")
    mask = upload(api)
    uses = [{"ref": "rex"}]
    made = ask(api, {"prompt": "<rex>", "adapters": uses, "mask_image": mask}).json()
    for path in (f"/v1/images/{mask}", "/v1/adapters/rex/versions/1"):
        assert made["id"] in problem_of(api.http.delete(path), 409)["detail"]
    api.http.post(f"/v1/jobs/{made['id']}/cancel").raise_for_status()
    assert api.http.delete(f"/v1/images/{mask}").status_code == 204


def test_the_client_uploads_masks_and_takes_names_of_adapters(api: Api, tmp_path: Path) -> None:
    api.add_version("rex")
    picture(0, (64, 64)).save(tmp_path / "mask.png")
    region = {"prompt": "<rex>", "adapters": ["rex"], "mask_image": tmp_path / "mask.png"}
    with api.client as look:
        made = look.generate("a room", regions=[region], compose="latents")
        [kept] = made["regions"]
        assert look.image_file(kept["mask_image"]["id"]).startswith(b"\x89PNG")
    assert (kept["versions"][0]["ref"], made["compose"]) == ("rex@1", "latents")
