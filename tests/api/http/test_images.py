"""Pictures to paint from: uploaded, owned, named in generations, deleted."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lookalike_datasets import images
from lookalike_platform.db.tables import UploadedImage
from lookalike_platform.jobs import lease as leases
from support_api import Api, paths_of, problem_of
from support_images import encoded, picture
from support_models import save_base


def upload(api: Api, size: tuple[int, int] = (96, 80), seed: int = 0) -> Any:
    files = {"image": ("photo.png", encoded(picture(seed, size), "PNG"), "image/png")}
    made = api.http.post("/v1/images", files=files)
    assert made.status_code == 201, made.text
    return made.json()


def ask(api: Api, **wanted: Any) -> Any:
    return api.http.post("/v1/generations", json={"prompt": "a dog", **wanted})


def of_somebody_else(api: Api) -> str:
    file = io.BytesIO(encoded(picture(1), "PNG"))
    context = api.context
    made = images.add(context.db, context.blobs, "else", "theirs.png", file, api.settings)
    return made.id


def test_an_image_is_kept_upright_and_without_metadata(api: Api) -> None:
    exif = Image.Exif()
    exif[271], exif[274] = "a camera", 6  # 274: turned
    sent = {"image": ("photo.jpg", encoded(picture(9), exif=exif), "image/jpeg")}
    made = api.http.post("/v1/images", files=sent).json()
    assert (made["filename"], made["width"], made["height"]) == ("photo.jpg", 80, 96)
    assert api.http.get(f"/v1/images/{made['id']}").json() == made
    answer = api.http.get(f"/v1/images/{made['id']}/file")
    assert answer.headers["content-type"] == "image/png"
    kept = Image.open(io.BytesIO(answer.content))
    assert kept.size == (80, 96)
    assert not kept.getexif()


def test_a_file_that_is_no_picture_is_refused_and_leaves_nothing(api: Api) -> None:
    before = api.kept()
    for data in (b"just text", encoded(picture(0, (20, 20)), "PNG"), b""):
        answer = api.http.post("/v1/images", files={"image": ("mask.png", data, "image/png")})
        assert paths_of(answer) == ["image"]
    assert api.kept() == before


def test_images_are_listed_newest_first_page_by_page(api: Api) -> None:
    made = [upload(api, seed=seed)["id"] for seed in range(3)]
    first = api.http.get("/v1/images?limit=2").json()
    second = api.http.get(f"/v1/images?limit=2&cursor={first['next_cursor']}").json()
    assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
    assert second["next_cursor"] is None
    problem_of(api.http.get("/v1/images?cursor=set_1"), 422)


def test_nobody_elses_image_can_be_seen_used_or_deleted(api: Api) -> None:
    theirs, mine = of_somebody_else(api), upload(api)["id"]
    assert [one["id"] for one in api.http.get("/v1/images").json()["items"]] == [mine]
    for ask_for in (api.http.get, api.http.delete):
        problem_of(ask_for(f"/v1/images/{theirs}"), 404)
    problem_of(api.http.get(f"/v1/images/{theirs}/file"), 404)
    assert paths_of(ask(api, init_image=theirs)) == ["init_image"]
    assert paths_of(ask(api, init_image=mine, mask_image=theirs)) == ["mask_image"]


def test_an_image_can_be_deleted_unless_a_job_uses_it(api: Api) -> None:
    photo, mask = upload(api)["id"], upload(api, seed=1)["id"]
    made = ask(api, init_image=photo, mask_image=mask)
    assert made.status_code == 202, made.text
    for one in (photo, mask):
        problem = problem_of(api.http.delete(f"/v1/images/{one}"), 409)
        assert made.json()["id"] in problem["detail"]
    lease = leases.claim(api.context.db, made.json()["id"], "worker", 60)
    assert lease is not None
    leases.succeed(api.context.db, lease, {"images": [], "warnings": [], "seconds": 1.0})
    for one in (photo, mask):
        assert api.http.delete(f"/v1/images/{one}").status_code == 204
        problem_of(api.http.get(f"/v1/images/{one}"), 404)
    assert api.kept()["blobs"] == []
    assert paths_of(ask(api, init_image=photo)) == ["init_image"]


def test_pixels_stay_as_long_as_an_image_or_a_set_has_them(api: Api) -> None:
    photo = encoded(picture(0), "PNG")
    files = [("images", (f"{n}.png", encoded(picture(n), "PNG"), "image/png")) for n in range(3)]
    data = {"name": "rex", "class_noun": "dog"}
    one_set = api.http.post("/v1/subject-sets", data=data, files=files).json()["id"]
    made = [
        api.http.post("/v1/images", files={"image": ("0.png", photo, "image/png")}).json()
        for _ in range(2)
    ]
    assert made[0]["sha256"] == made[1]["sha256"]
    api.http.delete(f"/v1/images/{made[0]['id']}").raise_for_status()
    api.http.delete(f"/v1/subject-sets/{one_set}").raise_for_status()
    assert api.kept()["blobs"] == [made[1]["sha256"]]
    api.http.delete(f"/v1/images/{made[1]['id']}").raise_for_status()
    assert api.kept()["blobs"] == []


def test_an_interval_that_ends_before_the_first_step_made_is_refused(api: Api) -> None:
    """Of 25 steps a picture to start from leaves the last 20, by default."""
    photo = upload(api)["id"]
    assert paths_of(ask(api, init_image=photo, guidance_interval=[0, 0.2])) == ["guidance_interval"]
    for enough in ({"guidance_interval": [0, 0.24]}, {"strength": 0.9}):
        wanted = {"guidance_interval": [0, 0.2], **enough}
        assert ask(api, init_image=photo, **wanted).status_code == 202


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((64, 64), {}, (64, 64)),
        ((640, 640), {}, (64, 64)),
        ((1000, 750), {}, (80, 64)),
        ((750, 1000), {}, (64, 80)),
        ((1000, 750), {"width": 128, "height": 96}, (128, 96)),
        ((8000, 64), {}, None),
        ((1000, 750), {"width": 64, "height": 64}, None),
        ((100, 100), {"width": 128}, None),
    ],
)
def test_pictures_have_the_proportions_of_the_one_they_start_from(
    api: Api, size: tuple[int, int], wanted: dict[str, int], expected: tuple[int, int] | None
) -> None:
    photo = upload(api, size)["id"]
    answer = ask(api, init_image=photo, **wanted)
    if expected is None:
        assert paths_of(answer) == ["init_image"]
        assert f"{size[0]} x {size[1]}" in answer.json()["errors"][0]["message"]
    else:
        assert (answer.json()["width"], answer.json()["height"]) == expected


def test_the_strength_is_decided_at_admission(api: Api) -> None:
    photo, mask = upload(api)["id"], upload(api, seed=1)["id"]
    assert ask(api, init_image=photo).json()["strength"] == 0.8
    assert ask(api, init_image=photo, mask_image=mask).json()["strength"] == 1.0
    made = ask(api, init_image=photo, mask_image=mask, strength=0.3).json()
    assert made["strength"] == 0.3
    assert (made["init_image"]["id"], made["mask_image"]["id"]) == (photo, mask)
    assert ask(api).json()["strength"] is None


def test_a_strength_that_leaves_no_step_is_refused_also_where_none_is_given(api: Api) -> None:
    photo, mask = upload(api)["id"], upload(api, seed=1)["id"]
    assert paths_of(ask(api, init_image=photo, strength=0.03)) == ["strength"]
    assert paths_of(ask(api, init_image=photo, steps=1)) == ["strength"]
    for enough in ({"steps": 2}, {"steps": 1, "strength": 1.0}, {"steps": 1, "mask_image": mask}):
        assert ask(api, init_image=photo, **enough).status_code == 202


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"init_image": "img_nothing"}, "init_image"),
        ({"init_image": "photo.png"}, "init_image"),
        ({"init_image": "PHOTO", "strength": 0}, "strength"),
        ({"init_image": "PHOTO", "strength": 1.5}, "strength"),
        ({"init_image": "PHOTO", "strength": 0.1, "steps": 5}, "strength"),
        ({"strength": 0.5}, "strength"),
        ({"mask_image": "PHOTO"}, "mask_image"),
        ({"init_image": "PHOTO", "mask_image": "SMALL"}, "mask_image"),
        ({"sampler": "euler", "eta": 0.5}, "eta"),
        ({"sampler": "ddim", "eta": 2}, "eta"),
        ({"guidance_rescale": 2}, "guidance_rescale"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval"),
        ({"guidance_interval": [0.2]}, "guidance_interval"),
        ({"guidance_interval": [0, 2]}, "guidance_interval"),
        ({"dynamic_threshold": 0}, "dynamic_threshold"),
        ({"dynamic_threshold": 99.5}, "dynamic_threshold"),
    ],
)
def test_what_cannot_be_painted_from_is_refused_before_it_is_queued(
    api: Api, wanted: dict[str, Any], path: str
) -> None:
    known = {"PHOTO": upload(api)["id"], "SMALL": upload(api, (80, 80))["id"]}
    before = api.kept()
    named = {field: known.get(str(value), value) for field, value in wanted.items()}
    assert paths_of(ask(api, **named)) == [path]
    assert api.kept() == before


def test_guidance_that_does_nothing_is_told(api: Api) -> None:
    made = ask(api, guidance_scale=1.0, negative_prompt="blue", guidance_rescale=0.5).json()
    [warning] = made["warnings"]
    assert "negative_prompt, guidance_rescale" in warning


def test_a_flow_base_refuses_samplers_that_cannot_follow_it(api: Api, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = save_base(tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    answer = ask(api, base=str(folder), sampler="pndm")
    assert paths_of(answer) == ["sampler"]
    assert "use base, dpmsolver++1" in answer.json()["errors"][0]["message"]
    for name in ("euler", "base", "heun"):
        assert ask(api, base=str(folder), sampler=name).status_code == 202


def test_the_client_uploads_files_and_takes_ids(api: Api, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    picture(0, (64, 64)).save(photo)
    with api.client as look:
        mask = look.add_image(photo)
        made = look.generate("a dog", init_image=photo, mask_image=mask["id"], strength=0.5)
        assert made["mask_image"]["id"] == mask["id"]
        assert {one["id"] for one in look.images()} == {
            mask["id"],
            made["init_image"]["id"],
        }
        assert Image.open(io.BytesIO(look.image_file(mask["id"]))).size == (64, 64)
        unused = look.add_image(photo)
        look.delete_image(unused["id"])
    with api.context.db.read_session() as session:
        assert session.get(UploadedImage, unused["id"]) is None
