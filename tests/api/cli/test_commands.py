"""What each command sends to the API, and what it prints."""

import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from lookalike_platform.jobs import lease as leases
from lookalike_platform.settings import get_settings
from support_api import Api
from support_cli import Lookalike
from support_images import photo


def worker_of(api: Api, kind: str, result: dict[str, Any]) -> threading.Thread:
    """Ends the first job of this kind that is queued with this result."""

    def work() -> None:
        query = f"/v1/jobs?kind={kind}&state=queued"
        while not (waiting := api.http.get(query).json()["items"]):
            time.sleep(0.02)
        lease = leases.claim(api.context.db, waiting[0]["id"], "worker", 60)
        assert lease is not None
        leases.succeed(api.context.db, lease, result)

    worker = threading.Thread(target=work)
    worker.start()
    return worker


def painter_of(api: Api) -> threading.Thread:
    made = [{"seed": 7, "sha256": api.context.blobs.put(b"PNG")}]
    return worker_of(api, "generate", {"images": made, "warnings": [], "seconds": 1.0})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "rex"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "0.txt").write_text("a dog on a sofa")
    return folder


def test_photos_of_a_folder_are_uploaded_with_their_captions(
    lookalike: Lookalike, photos: Path
) -> None:
    made = lookalike("subjects", "add", photos, "--class-noun", "dog", "--json").json
    assert (made["name"], made["class_noun"]) == ("rex", "dog")
    assert [image["caption"] for image in made["images"]] == ["a dog on a sofa", None, None]
    assert lookalike("subjects", "list", "--json").json == [made]
    assert lookalike("subjects", "show", made["id"], "--json").json == made


def test_the_verdict_on_each_photo_is_printed(lookalike: Lookalike, photos: Path) -> None:
    Image.new("RGB", (20, 20)).save(photos / "small.png")
    ran = lookalike("subjects", "add", photos, "-c", "dog")
    line = next(line for line in ran.out.splitlines() if "small.png" in line)
    assert "refused" in line
    assert "20" in line
    assert "3 of 4" in lookalike("subjects", "list").out


def test_a_deleted_subject_set_is_gone(lookalike: Lookalike, api: Api) -> None:
    set_id = api.add_set()["id"]
    assert lookalike("subjects", "delete", set_id, "--json").json == {"deleted": set_id}
    assert lookalike("subjects", "list", "--json").json == []
    assert "No subject sets" in lookalike("subjects", "list").out


def test_training_a_folder_uploads_it_first(lookalike: Lookalike, photos: Path) -> None:
    job = lookalike("train", photos, "-c", "dog", "--detach", "--json").json
    assert (job["state"], job["concept"]) == ("queued", "rex")
    assert [one["id"] for one in lookalike("jobs", "list", "--json").json] == [job["id"]]


def test_training_photos_without_saying_what_they_show_is_refused(
    lookalike: Lookalike, photos: Path
) -> None:
    ran = lookalike("train", photos, "--detach")
    assert ran.code == 1
    assert "--class-noun" in ran.err


def test_options_come_from_a_file_and_from_the_command_line(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    file = tmp_path / "options.toml"
    file.write_text('rank = 4\nsteps = 50\nlr_scheduler = "cosine"\n')
    set_id = api.add_set()["id"]
    given = ["--config", file, "--set", "steps=60", "--set", "prior.num_images=2"]
    job = lookalike("train", set_id, "--concept", "my-rex", *given, "--detach", "--json").json
    config = job["request"]["config"]
    assert job["concept"] == "my-rex"
    assert (config["rank"], config["steps"], config["lr_scheduler"]) == (4, 60, "cosine")
    assert config["prior"]["num_images"] == 2


@pytest.mark.parametrize(
    ("option", "said"), [("steps", "--set steps=VALUE"), ("stepz=3", "config.stepz")]
)
def test_an_option_that_cannot_be_is_named(
    lookalike: Lookalike, api: Api, option: str, said: str
) -> None:
    ran = lookalike("train", api.add_set()["id"], "--set", option, "--detach")
    assert ran.code == 1
    assert ran.out == ""
    assert said in ran.err


def test_a_file_of_options_that_cannot_be_read_is_named(lookalike: Lookalike, api: Api) -> None:
    ran = lookalike("train", api.add_set()["id"], "--config", "none.toml", "--detach")
    assert ran.code == 1
    assert "none.toml" in ran.err


def test_a_dry_run_says_what_it_would_cost_and_queues_nothing(
    lookalike: Lookalike, api: Api
) -> None:
    preview = lookalike("train", api.add_set()["id"], "--dry-run", "--json").json
    assert preview["steps"] == 300
    assert lookalike("jobs", "list", "--json").json == []


def test_a_job_shows_who_worked_on_it(lookalike: Lookalike, api: Api) -> None:
    job = lookalike("train", api.add_set()["id"], "--detach", "--json").json
    assert leases.claim(api.context.db, job["id"], "worker-7", 30)
    shown = lookalike("jobs", "show", job["id"], "--json").json
    assert [attempt["worker"] for attempt in shown["attempts"]] == ["worker-7"]
    assert "worker-7" in lookalike("jobs", "show", job["id"]).out


def test_a_canceled_job_ends_its_events(lookalike: Lookalike, api: Api) -> None:
    job_id = lookalike("train", api.add_set()["id"], "--detach", "--json").json["id"]
    assert lookalike("jobs", "cancel", job_id, "--json").json["outcome"] == "canceled"
    assert "finished already" in lookalike("jobs", "cancel", job_id).out
    events = [
        json.loads(line) for line in lookalike("jobs", "events", job_id, "--json").out.splitlines()
    ]
    assert [event["payload"]["state"] for event in events] == ["queued", "canceled"]
    assert "canceled" in lookalike("jobs", "events", job_id).out
    listed = lookalike("jobs", "list", "--state", "canceled", "--kind", "train", "--json").json
    assert [job["id"] for job in listed] == [job_id]


def test_an_adapters_versions_aliases_and_files_are_at_hand(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    api.register_version("rex")
    api.register_version("rex")
    assert lookalike("adapters", "alias", "rex", "best", 1, "--json").json["version"] == 1
    (one,) = lookalike("adapters", "list", "--json").json
    assert (one["name"], one["versions"], one["aliases"]["best"]) == ("rex", 2, 1)
    assert "best → 1" in lookalike("adapters", "list").out
    shown = lookalike("adapters", "show", "rex", "--json").json
    assert [version["ref"] for version in shown] == ["rex@2", "rex@1"]
    saved = lookalike("adapters", "download", "rex@best", "--out", tmp_path / "got", "--json").json
    assert {Path(file).name for file in saved["files"]} == set(shown[1]["files"])
    assert all(Path(file).stat().st_size for file in saved["files"])
    assert lookalike("adapters", "delete", "rex@1", "--json").json == {"deleted": "rex@1"}
    assert len(lookalike("adapters", "show", "rex", "--json").json) == 1


def test_an_adapter_goes_out_for_other_programs_and_theirs_come_in(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    api.add_version("rex")
    out = tmp_path / "out"
    (made,) = lookalike("adapters", "export", "rex", out, "--format", "kohya", "--json").json[
        "files"
    ]
    about = ("--name", "guest", "--class-noun", "dog", "--trigger", "zwx")
    refused = lookalike("adapters", "import", made, *about)
    assert refused.code == 1
    assert "is no layer of the base model" in refused.err or "another one" in refused.err


def test_deleting_an_adapter_without_its_version_is_refused(lookalike: Lookalike) -> None:
    ran = lookalike("adapters", "delete", "rex")
    assert ran.code == 1
    assert "rex@3" in ran.err


def test_the_base_models_are_listed(lookalike: Lookalike) -> None:
    names = [base["name"] for base in lookalike("bases", "list", "--json").json]
    assert "pocket-64" in names
    assert "pocket-64" in lookalike("bases", "list").out


def test_an_error_of_the_api_is_a_problem_on_standard_output_with_json(
    lookalike: Lookalike,
) -> None:
    ran = lookalike("jobs", "show", "job_none", "--json")
    assert ran.code == 1
    assert ran.json["type"] == "urn:lookalike:problem:not-found"
    assert ran.err == ""


def test_an_error_for_people_goes_to_standard_error(lookalike: Lookalike) -> None:
    ran = lookalike("jobs", "show", "job_none")
    assert ran.code == 1
    assert ran.out == ""
    assert "job_none" in ran.err


def test_an_api_that_is_not_there_is_said_with_what_to_do(lookalike: Lookalike) -> None:
    ran = lookalike("jobs", "list", "--url", "http://127.0.0.1:9")
    assert ran.code == 1
    assert "lookalike up" in ran.err


def test_without_a_stack_here_another_homes_api_at_the_usual_address_is_not_asked(
    lookalike: Lookalike, api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOOKALIKE_URL")
    monkeypatch.setenv("LOOKALIKE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("LOOKALIKE_API_PORT", str(urlsplit(api.url).port))
    get_settings.cache_clear()
    ran = lookalike("adapters", "list")
    get_settings.cache_clear()
    assert ran.code == 1
    assert str(tmp_path / "empty") in ran.err
    assert "lookalike up" in ran.err


def test_a_scale_that_is_no_number_is_refused(lookalike: Lookalike) -> None:
    ran = lookalike("sample", "a <rex>", "--adapter", "rex:much")
    assert ran.code == 1
    assert "rex:much" in ran.err


def test_a_wrong_prompt_is_refused_with_its_field(lookalike: Lookalike) -> None:
    ran = lookalike("sample", "a <rex>", "--json")
    assert ran.code == 1
    assert [error["path"] for error in ran.json["errors"]] == ["prompt"]


def test_pictures_to_start_from_are_uploaded_and_named(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "photo.png")
    Image.new("L", (96, 64), 255).save(tmp_path / "mask.png")

    worker = painter_of(api)
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    options = ["--init-image", photo, "--mask", mask, "--strength", 0.6, "--eta", 0.5]
    options += ["--rescale", 0.7, "--interval", 0.2, 0.8, "--threshold", 0.99]
    ran = lookalike("sample", "a dog", "--sampler", "ddim", *options, "--out", tmp_path, "--json")
    worker.join()
    assert ran.code == 0, ran.err
    made = ran.json
    assert (made["width"], made["height"], made["strength"], made["eta"]) == (96, 64, 0.6, 0.5)
    assert made["guidance_interval"] == [0.2, 0.8]
    assert (made["guidance_rescale"], made["dynamic_threshold"]) == (0.7, 0.99)
    uploads = {one["id"]: one["filename"] for one in api.http.get("/v1/images").json()["items"]}
    named = [uploads[made[field]["id"]] for field in ("init_image", "mask_image")]
    assert named == ["photo.png", "mask.png"]


def test_regions_are_places_adapters_and_prompts(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    for name in ("rex", "tom"):
        api.add_version(name)

    worker = painter_of(api)
    options = ["--region", f"{tmp_path / 'mask.png'} | | a room"]
    options += ["--region", "0,0,.5,1 | rex:0.8, tom@1 | <rex> | <tom>", "--compose", "latents"]
    ran = lookalike("sample", "a dog", *options, "--out", tmp_path, "--json")
    worker.join()
    assert ran.code == 0, ran.err
    room, both = ran.json["regions"]
    assert (room["prompt"], room["versions"], room["box"]) == ("a room", [], None)
    assert room["mask_image"]["id"].startswith("img_")
    assert (both["prompt"], both["box"]) == ("<rex> | <tom>", [0, 0, 0.5, 1])
    uses = [(version["asked"], version["scale"]) for version in both["versions"]]
    assert uses == [("rex", 0.8), ("tom@1", 1.0)]
    assert ran.json["compose"] == "latents"


def test_pictures_are_listed_with_the_adapters_of_their_regions(
    lookalike: Lookalike, api: Api, tmp_path: Path
) -> None:
    for name in ("rex", "tom"):
        api.add_version(name)
    worker = painter_of(api)
    options = ["--region", "0,0,.5,1 | rex:0.8, tom | a dog", "--region", ".5,0,1,1 | tom | a dog"]
    ran = lookalike("sample", "a dog", *options, "--out", tmp_path)
    worker.join()
    assert ran.code == 0, ran.err
    assert "rex@1 x 0.8, tom@1 x 1" in " ".join(ran.out.split())
    assert "none" not in ran.out


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ("0,0,1,1: a dog", "PLACE|ADAPTERS|PROMPT"),
        ("0,0,1,1 | rex |", "PLACE|ADAPTERS|PROMPT"),
        ("left | rex | a dog", "'left' is no place"),
        ("0,0,1,1 | rex:much | a dog", "rex:much"),
        ("0,0,1 | | a dog", "regions[0].box"),
    ],
)
def test_a_region_that_cannot_be_read_is_refused_with_how_to_write_it(
    lookalike: Lookalike, region: str, said: str
) -> None:
    ran = lookalike("sample", "a dog", "--region", region)
    assert ran.code == 1
    assert said in ran.err


def test_an_evaluation_is_followed_and_its_figures_printed(lookalike: Lookalike, api: Api) -> None:
    api.add_version("rex")
    set_id = api.add_set()["id"]
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}

    figures = {"subject_fidelity": {"dino": figure}}
    worker = worker_of(api, "evaluate", {"figures": figures, "seconds": 1.0})
    ran = lookalike("evaluate", "rex", "--subject-set", set_id)
    worker.join()
    assert ran.code == 0, ran.err
    line = next(line for line in ran.out.splitlines() if "subject fidelity" in line)
    assert line.split()[2:] == ["dino", "0.500", "0.250", "to", "0.750", "(8)"]


def test_what_combines_with_what_is_listed(lookalike: Lookalike) -> None:
    pairs = lookalike("compositions", "rules", "--json").json["combinations"]
    assert [p["merges"] for p in pairs if (p["one"], p["other"]) == ("lora", "t_lora")] == [[]]
    lines = lookalike("compositions", "rules").out.splitlines()
    [line] = [line for line in lines if line.split()[:2] == ["dora", "dreambooth"]]
    assert "no: DoRA gives the base's own rows new lengths" in line


def test_a_merge_is_followed_and_its_version_told(lookalike: Lookalike, api: Api) -> None:
    api.add_version("rex")
    api.add_version("tom", trigger="zwx")

    worker = worker_of(api, "compose", {"ref": "duo@1"})
    ran = lookalike("compose", "duo", "rex@1", "tom:0.5", "--strategy", "svd", "--rank", "2")
    worker.join()
    assert ran.code == 0, ran.err
    assert 'duo@1 is merged by svd. Paint it: lookalike sample "<rex> and <tom>"' in ran.out
    [job] = api.http.get("/v1/jobs?kind=compose").json()["items"]
    assert [p["scale"] for p in job["request"]["adapters"]] == [1.0, 0.5]
    assert job["request"]["options"]["rank"] == 2
