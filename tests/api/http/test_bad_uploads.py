"""Uploads that must be refused: with what to do about it, storing nothing, touching nothing."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from support_api import Api, problem_of
from support_images import encoded, photo, picture, png_header, zipped

Send = Callable[[Api], httpx.Response]

FIELDS = {"name": "rex", "class_noun": "dog"}


def images(*contents: bytes, **fields: str) -> Send:
    files = [("images", (f"{i}.jpg", content)) for i, content in enumerate(contents)]
    return lambda api: api.http.post("/v1/subject-sets", data=FIELDS | fields, files=files)


def archive(**entries: bytes) -> Send:
    return lambda api: api.http.post(
        "/v1/subject-sets", data=FIELDS, files={"archive": ("a.zip", zipped(entries).read())}
    )


def animated() -> bytes:
    frames = [picture(1), picture(2)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


GOOD = [photo(i) for i in range(3)]

BAD: dict[str, tuple[Send, int, str]] = {
    "no images": (lambda api: api.http.post("/v1/subject-sets", data=FIELDS), 422, "at least 3"),
    "one image": (images(GOOD[0]), 422, "at least 3"),
    "500 images": (images(*[b"x"] * 500), 422, "at most 30"),
    "1,001 images": (images(*[b"x"] * 1001), 400, "1000"),
    "texts named .jpg": (images(b"a", b"b", b"c"), 422, "not a JPEG"),
    "30,000 pixels": (images(GOOD[0], GOOD[1], png_header(30_000, 90)), 422, "30000 x 90"),
    "a decompression bomb": (images(*GOOD[:2], png_header(30_000, 30_000)), 422, "many pixels"),
    "the same picture thrice": (images(GOOD[0], GOOD[0], GOOD[0]), 422, "same picture"),
    "animations": (images(GOOD[0], GOOD[1], animated()), 422, "animated"),
    "tiny pictures": (images(*[encoded(picture(i, (20, 20))) for i in range(3)]), 422, "too small"),
    "half of a JPEG": (images(GOOD[0], GOOD[1], GOOD[2][:900]), 422, "damaged"),
    "no class noun": (images(*GOOD, class_noun=""), 422, "class_noun"),
    "markup as class noun": (images(*GOOD, class_noun="<b>"), 422, "class_noun"),
    "a name that is none": (images(*GOOD, name="../x"), 422, "name"),
    "captions that are no JSON": (images(*GOOD, captions="{"), 422, "captions"),
    "captions of files not there": (images(*GOOD, captions='{"9.jpg": "a"}'), 422, "9.jpg"),
    "a zip with ../": (archive(**{"../a.jpg": GOOD[0], "b.jpg": GOOD[1]}), 422, "outside"),
    "a zip of one photo": (archive(**{"a.jpg": GOOD[0]}), 422, "at least 3"),
    "a zip that is none": (
        lambda api: api.http.post(
            "/v1/subject-sets", data=FIELDS, files={"archive": ("a.zip", b"PK no")}
        ),
        422,
        "not a zip",
    ),
    "images and a zip": (
        lambda api: api.http.post(
            "/v1/subject-sets",
            data=FIELDS,
            files=[("images", ("a.jpg", GOOD[0])), ("archive", ("a.zip", zipped({}).read()))],
        ),
        422,
        "not both",
    ),
    "JSON where a form belongs": (
        lambda api: api.http.post("/v1/subject-sets", json=FIELDS),
        422,
        "name",
    ),
    "a form that breaks off": (
        lambda api: api.http.post(
            "/v1/subject-sets",
            content=b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nre',
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        ),
        422,
        "missing",
    ),
    "a form without boundary": (
        lambda api: api.http.post(
            "/v1/subject-sets", content=b"x", headers={"Content-Type": "multipart/form-data"}
        ),
        400,
        "boundary",
    ),
    "a field of 2 MB": (images(*GOOD, captions="x" * 2_000_000), 400, "1024"),
    "a file name of two lines": (
        lambda api: api.http.post(
            "/v1/subject-sets",
            data=FIELDS,
            files=[("images", (f"{i}\u2028.jpg", GOOD[i])) for i in range(3)],
        ),
        422,
        "images[0]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_and_nothing_is_stored(api: Api, name: str) -> None:
    send, status, said = BAD[name]
    earlier = api.add_set("earlier")
    before = api.kept()
    problem = problem_of(send(api), status)
    assert said in str(problem)
    assert api.kept() == before
    assert api.http.get(f"/v1/subject-sets/{earlier['id']}").json() == earlier


def test_a_refused_image_is_named_by_its_place(api: Api) -> None:
    problem = problem_of(images(GOOD[0], b"text", GOOD[1])(api), 422)
    [error] = problem["errors"]
    assert error["path"] == "images[1]"
    assert "1.jpg" in error["message"]


def test_a_body_above_the_limit_is_cut_off_whatever_length_it_announces(api: Api) -> None:
    before = api.kept()

    def endless() -> Any:
        for _ in range(40):
            yield b" " * 2**16

    announced = api.http.post("/v1/jobs", content=b" " * (2**20 + 1))
    assert "1 MiB" in problem_of(announced, 413)["detail"]
    chunked = api.http.post(
        "/v1/jobs", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert "1 MiB" in problem_of(chunked, 413)["detail"]
    assert api.kept() == before


def test_an_upload_above_the_limit_is_cut_off(api: Api) -> None:
    before = api.kept()
    limit = api.settings.max_upload_bytes + 2**20

    def endless() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(limit // 2**22 + 1):
            yield bytes(2**22)

    answer = api.http.post(
        "/v1/subject-sets",
        content=endless(),
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert "257 MiB" in problem_of(answer, 413)["detail"]
    assert api.kept() == before
