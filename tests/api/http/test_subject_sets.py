import io
import json

from PIL import Image

from support_api import Api, problem_of
from support_images import encoded, photo, picture, zipped

FIELDS = {"name": "rex", "class_noun": "dog"}


def test_photos_become_a_set_with_a_verdict_for_each_and_a_digest(api: Api) -> None:
    files = [("images", (f"{i}.jpg", photo(i), "image/jpeg")) for i in range(3)]
    files.append(("images", ("notes.jpg", b"just text", "image/jpeg")))
    captions = json.dumps({"0.jpg": "a dog on a sofa"})
    made = api.http.post("/v1/subject-sets", data={**FIELDS, "captions": captions}, files=files)
    assert made.status_code == 201
    body = made.json()
    assert [image["verdict"] for image in body["images"]] == ["accepted"] * 3 + ["refused"]
    assert "JPEG" in body["images"][3]["reason"]
    assert body["images"][0]["caption"] == "a dog on a sofa"
    assert len(body["digest"]) == 64
    assert api.http.get(f"/v1/subject-sets/{body['id']}").json() == body


def test_one_zip_does_as_well_with_captions_from_its_texts(api: Api) -> None:
    entries = {f"{i}.jpg": photo(i) for i in range(3)} | {"1.txt": b"a dog in snow"}
    files = {"archive": ("photos.zip", zipped(entries), "application/zip")}
    body = api.http.post("/v1/subject-sets", data=FIELDS, files=files).json()
    assert [image["caption"] for image in body["images"]] == [None, "a dog in snow", None]


def test_an_accepted_photo_comes_back_as_png_without_metadata(api: Api) -> None:
    exif = Image.Exif()
    exif[271] = "a camera"
    upright = [("images", (f"{i}.jpg", photo(i), "image/jpeg")) for i in range(2)]
    tagged = ("images", ("t.jpg", encoded(picture(9), exif=exif), "image/jpeg"))
    set_id = api.http.post("/v1/subject-sets", data=FIELDS, files=[*upright, tagged]).json()["id"]
    answer = api.http.get(f"/v1/subject-sets/{set_id}/images/2")
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(answer.content))
    assert image.size == picture(9).size
    assert not image.getexif()
    problem_of(api.http.get(f"/v1/subject-sets/{set_id}/images/7"), 404)


def test_sets_are_listed_newest_first_page_by_page(api: Api) -> None:
    made = [api.add_set(f"rex-{number}")["id"] for number in range(3)]
    first = api.http.get("/v1/subject-sets?limit=2").json()
    second = api.http.get(f"/v1/subject-sets?limit=2&cursor={first['next_cursor']}").json()
    assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
    assert second["next_cursor"] is None


def test_a_set_can_be_deleted_unless_a_job_uses_it(api: Api) -> None:
    used, unused = api.add_set("rex")["id"], api.add_set("tom")["id"]
    api.http.post("/v1/jobs", json={"method": "lora", "subject_set": used}).raise_for_status()
    assert api.http.delete(f"/v1/subject-sets/{unused}").status_code == 204
    problem_of(api.http.get(f"/v1/subject-sets/{unused}"), 404)
    problem = problem_of(api.http.delete(f"/v1/subject-sets/{used}"), 409)
    assert "cancel" in problem["detail"]
    assert api.http.get(f"/v1/subject-sets/{used}").status_code == 200
