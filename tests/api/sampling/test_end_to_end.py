"""Generations through everything: HTTP, broker, worker, resident process; and what may go wrong."""

import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image

from lookalike_api.client import Client
from lookalike_api.stack import free_port
from lookalike_platform.blobs import open_blobs
from lookalike_platform.db.engine import migrate, open_database
from lookalike_platform.errors import LookalikeError
from lookalike_platform.samplers import SAMPLERS
from lookalike_platform.settings import Settings
from support_api import add_version
from support_images import picture
from support_sampling import LIBRARY_WARNINGS, reference, save_adapter
from support_stack import installation, processes_of, running, until

pytestmark = [pytest.mark.processes, *LIBRARY_WARNINGS]

LONG: dict[str, Any] = {"prompt": "a dog", "steps": 400, "seed": 5}


STACKS = [("sqlite", "embedded"), ("postgresql", "redis"), ("sqlite", "rabbitmq")]
on_every_stack = pytest.mark.parametrize("installed", STACKS, indirect=True, ids="-".join)
# Where database and broker play no part, once is enough.
on_the_embedded_stack = pytest.mark.parametrize(
    "installed", STACKS[:1], indirect=True, ids="-".join
)


@dataclass
class Installed:
    settings: Settings
    client: Client
    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def installed(
    request: pytest.FixtureRequest, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """A running stack with two adapters: rex, and tom, which has text encoder weights too.

    The embedded one's worker listens for the API's calls.
    """
    database, broker = request.param
    home = tmp_path_factory.mktemp(broker)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        # Threads of several processes that wait for each other cost more than they save here.
        patch.setenv("OMP_NUM_THREADS", "1")
        settings = stack.enter_context(installation(database, broker, base_folder, home))
        if broker == "embedded":
            url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
            settings = settings.model_copy(update={"sampler_url": url})
        adapters = {}
        migrate(settings.database_url)
        db, blobs = open_database(settings.database_url), open_blobs(settings)
        for seed, name in enumerate(("rex", "tom")):
            path = home / f"{name}.safetensors"
            save_adapter(path, base_folder, seed, text_encoder=name == "tom")
            trigger = ("sks", "zwx")[seed]
            options: dict[str, Any] = {"base": str(base_folder), "trigger": trigger}
            add_version(settings, db, blobs, name, weights=path, **options)
            adapters[name] = path
        db.close()
        client = stack.enter_context(running(settings))
        yield Installed(settings, client, base_folder, adapters)


def sampler_of(home: Path) -> int:
    """The process id of the resident process."""
    return int(
        until(lambda: [p for p, c in processes_of(home).items() if "lookalike_api.sampling" in c])[
            0
        ]
    )


def started(client: Client, generation_id: str) -> Any:
    """The progress of a generation once it has begun."""
    return until(lambda: client.generation(generation_id)["progress"])


def figure(installed: Installed, name: str) -> float:
    """One of the host's adapter cache, from where the worker listens."""
    told = httpx.get(f"{installed.settings.sampler_url}/metrics").text
    key = f'lookalike_adapter_cache_{name}{{cache="host"}} '
    (line,) = [line for line in told.splitlines() if line.startswith(key)]
    return float(line.removeprefix(key))


def differences(ours: Sequence[bytes], theirs: Sequence[Any]) -> list[int]:
    """The largest difference of each pair of pictures, in 255ths."""
    return [
        int(abs(numpy.asarray(Image.open(io.BytesIO(one)), int) - numpy.asarray(two, int)).max())
        for one, two in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize(("sampler", "guidance_scale"), [("ddpm", 1.0), ("dpmsolver++", 4.0)])
@on_every_stack
def test_pictures_of_two_adapters_are_those_of_plain_diffusers(
    installed: Installed, sampler: str, guidance_scale: float
) -> None:
    client, scales = installed.client, {"rex": 0.8, "tom": 0.5}
    made = client.generate(
        "<rex>, <tom>",
        adapters=[{"ref": f"{name}@candidate", "scale": s} for name, s in scales.items()],
        sampler=sampler,
        guidance_scale=guidance_scale,
        steps=5,
        seed=11,
        num_images=2,
        wait=100,
    )
    assert (made["state"], made["warnings"]) == ("succeeded", [])
    assert [version["ref"] for version in made["versions"]] == ["rex@1", "tom@1"]
    assert [image["seed"] for image in made["images"]] == [11, 12]
    pictures = [client.image(made["id"], index) for index in range(2)]
    plain = reference(
        installed.base,
        "sks dog, zwx dog",
        adapters=[(installed.adapters[name], scale) for name, scale in scales.items()],
        sampler=SAMPLERS[sampler],
        guidance_scale=guidance_scale,
        num_inference_steps=5,
        seed=11,
        num_images=2,
        width=64,
        height=64,
    )
    # Threads split the work otherwise there than here: at most one of 255 levels.
    assert max(differences(pictures, plain)) <= 1


@on_the_embedded_stack
def test_the_parameters_in_a_picture_make_it_again(installed: Installed) -> None:
    client = installed.client
    made = client.generate("<rex>", adapters=["rex"], steps=3, num_images=2, wait=100)
    second = Image.open(io.BytesIO(client.image(made["id"], 1)))
    parameters = json.loads(second.text["parameters"])  # type: ignore[attr-defined]
    assert parameters["versions"][0]["digest"] == made["versions"][0]["digest"]
    again = client.generate(**parameters["request"], wait=100)
    assert again["images"][0]["seed"] == made["images"][1]["seed"]
    assert differences([client.image(again["id"])], [second]) <= [1]


@on_the_embedded_stack
def test_a_picture_painted_over_another_is_made_again_by_its_parameters(
    installed: Installed, tmp_path: Path
) -> None:
    """And is what diffusers makes of the same picture, mask and adapter."""
    import diffusers
    import torch

    photo, mask = picture(3, (64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    client = installed.client
    made = client.generate(
        "<rex>",
        adapters=["rex"],
        sampler="ddim",
        steps=6,
        strength=0.7,
        seed=5,
        init_image=tmp_path / "photo.png",
        mask_image=tmp_path / "mask.png",
        wait=100,
    )
    found = Image.open(io.BytesIO(client.image(made["id"])))
    parameters = json.loads(found.text["parameters"])  # type: ignore[attr-defined]
    images = [made["init_image"], made["mask_image"]]
    assert parameters["images"] == images
    again = client.generate(**parameters["request"], wait=100)
    assert [again["init_image"], again["mask_image"]] == images
    assert differences([client.image(again["id"])], [found]) == [0]

    pipeline = diffusers.AutoPipelineForInpainting.from_pretrained(installed.base)
    pipeline.set_progress_bar_config(disable=True)
    path = installed.adapters["rex"]
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    plain = pipeline(
        "sks dog",
        image=photo,
        mask_image=mask,
        masked_image_latents=torch.zeros(1, 4, 16, 16),
        width=64,
        height=64,
        strength=0.7,
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(5)],
    ).images
    assert max(differences([client.image(made["id"])], plain)) <= 1


@pytest.mark.parametrize("compose", ["attention", "latents"])
@on_the_embedded_stack
def test_regions_with_adapters_of_their_own_are_made_again_by_the_parameters(
    installed: Installed, tmp_path: Path, compose: str
) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    client = installed.client
    left = {"prompt": "<rex>", "adapters": ["rex"], "box": [0, 0, 0.5, 1]}
    tom = {"ref": "tom", "scale": 0.5}
    right = {"prompt": "a <tom>", "adapters": [tom], "mask_image": tmp_path / "mask.png"}
    common: dict[str, Any] = {"compose": compose, "steps": 3, "seed": 5}
    made = client.generate("a room", regions=[left, right], **common, wait=100)
    assert (made["state"], made["warnings"]) == ("succeeded", [])
    assert [region["bound_prompt"] for region in made["regions"]] == ["sks dog", "a zwx dog"]
    found = Image.open(io.BytesIO(client.image(made["id"])))
    parameters = json.loads(found.text["parameters"])  # type: ignore[attr-defined]
    assert [version["ref"] for version in parameters["versions"]] == ["rex@1", "tom@1"]
    assert parameters["images"] == [made["regions"][1]["mask_image"]]
    again = client.generate(**parameters["request"], wait=100)
    assert again["regions"][1]["mask_image"] == made["regions"][1]["mask_image"]
    assert differences([client.image(again["id"])], [found]) == [0]
    swapped = [
        {**left, "box": [0.5, 0, 1, 1]},
        {**right, "mask_image": None, "box": [0, 0, 0.5, 1]},
    ]
    other = client.generate("a room", regions=swapped, **common, wait=100)
    assert differences([client.image(other["id"])], [found]) > [1]


@on_the_embedded_stack
def test_every_option_of_guidance_and_noise_acts_and_is_kept(installed: Installed) -> None:
    """Each changes the picture, and the picture's parameters make it again."""
    client = installed.client
    common: dict[str, Any] = {"sampler": "ddim", "steps": 4, "seed": 5, "guidance_scale": 8.0}
    plain = client.generate("a dog", **common, wait=100)
    for option in (
        {"eta": 0.7},
        {"guidance_rescale": 0.6},
        {"guidance_interval": [0.25, 0.75]},
        {"dynamic_threshold": 0.9},
    ):
        made = client.generate("a dog", **common, **option, wait=100)
        found = Image.open(io.BytesIO(client.image(made["id"])))
        assert differences([client.image(plain["id"])], [found]) > [1], option
        parameters = json.loads(found.text["parameters"])  # type: ignore[attr-defined]
        again = client.generate(**parameters["request"], wait=100)
        assert differences([client.image(again["id"])], [found]) == [0], option


@on_the_embedded_stack
def test_progress_is_told_until_the_pictures_are_there(installed: Installed) -> None:
    told: list[Any] = []
    made = installed.client.generate(**LONG)
    job = installed.client.wait(made["id"], on_progress=told.append)
    assert job["state"] == "succeeded"
    assert [now["step"] for now in told] == sorted(now["step"] for now in told)
    assert (told[-1]["total"], "steps_per_second" in told[-1]) == (400, True)


@on_the_embedded_stack
def test_a_long_prompt_is_cut_off_with_a_warning(installed: Installed) -> None:
    made = installed.client.generate("dog " * 40, steps=1, wait=100)
    assert any("cut off" in warning for warning in made["warnings"])


@on_the_embedded_stack
def test_a_running_generation_can_be_canceled(installed: Installed) -> None:
    client = installed.client
    made = client.generate(**LONG)
    started(client, made["id"])
    assert client.cancel(made["id"])["outcome"] == "requested"
    assert client.wait(made["id"])["state"] == "canceled"
    assert client.generate("a dog", steps=1, wait=100)["state"] == "succeeded"


@on_the_embedded_stack
def test_a_sampler_killed_in_the_middle_is_started_again_and_finishes(installed: Installed) -> None:
    """And holds no adapter any more."""
    client = installed.client
    made = client.generate(**LONG, adapters=["rex@candidate"])
    started(client, made["id"])
    assert figure(installed, "pinned") == 1
    os.kill(sampler_of(installed.settings.home), signal.SIGKILL)
    messages: list[Any] = []
    job = client.wait(made["id"], on_event=messages.append)
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert any("signal 9" in event["payload"].get("text", "") for event in messages)
    until(lambda: (figure(installed, "pinned"), figure(installed, "loads_total")) == (0, 1))


@on_the_embedded_stack
def test_a_worker_told_to_end_gives_its_job_back_to_the_next(installed: Installed) -> None:
    client, home = installed.client, installed.settings.home
    made = client.generate(**LONG)
    started(client, made["id"])
    [worker] = [p for p, c in processes_of(home).items() if "worker --queue sample" in c]
    os.kill(worker, signal.SIGTERM)
    assert client.wait(made["id"])["state"] == "succeeded"
    *before, last = [attempt["outcome"] for attempt in client.attempts(made["id"])]
    # On its way out a worker may be handed the job once more, and hands it back once more.
    assert (set(before), last) == ({"drained"}, "succeeded")


@on_the_embedded_stack
def test_a_worker_killed_takes_its_sampler_along_and_the_job_is_done_by_the_next(
    installed: Installed,
) -> None:
    client, home = installed.client, installed.settings.home
    made = client.generate(**LONG)
    started(client, made["id"])
    sampler = sampler_of(home)
    [worker] = [p for p, c in processes_of(home).items() if "worker --queue sample" in c]
    os.kill(worker, signal.SIGKILL)
    until(lambda: sampler not in processes_of(home), 20)
    assert client.wait(made["id"])["state"] == "succeeded"
    outcomes = [attempt["outcome"] for attempt in client.attempts(made["id"])]
    assert outcomes == ["lost", "succeeded"]


@on_the_embedded_stack
def test_a_failed_generation_is_raised_by_the_client_with_what_to_do(installed: Installed) -> None:
    client, blobs = installed.client, open_blobs(installed.settings)
    digest = client.adapter_version("tom")["digest"]
    blobs.path(digest).write_bytes(b"not the weights any more")
    made = client.generate("<tom>", adapters=["tom"], steps=1, seed=1)
    os.kill(sampler_of(installed.settings.home), signal.SIGKILL)  # which has tom in memory
    with pytest.raises(LookalikeError, match="safetensors"):
        client.wait(made["id"])
