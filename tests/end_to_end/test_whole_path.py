"""Photos in, personalized pictures out, through real processes; and what may go wrong midway."""

import os
import signal
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lookalike_api.client import Client
from lookalike_platform.errors import TrainingFailed
from lookalike_platform.settings import Settings
from support_stack import (
    QUICK,
    installation,
    photos,
    processes_of,
    running,
    trainers_of,
    until,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

LONG: dict[str, Any] = {**QUICK, "steps": 300, "checkpoint_every": 20}
ENDLESS: dict[str, Any] = {**QUICK, "steps": 100_000, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def on_redis(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("redis")
    with installation("postgresql", "redis", tiny_base, home) as settings:
        yield settings


@pytest.fixture(scope="module")
def on_rabbitmq(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("rabbitmq")
    with installation("postgresql", "rabbitmq", tiny_base, home) as settings:
        yield settings


@pytest.fixture(scope="module")
def embedded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("embedded")
    with installation("sqlite", "embedded", tiny_base, home) as settings:
        yield settings


def start_training(client: Client, folder: Path, name: str, config: dict[str, Any]) -> str:
    subject = client.add_subject_set(photos(folder / name), class_noun="dog", name=name)
    job: str = client.train(subject["id"], config={"trigger": "sks", **config})["id"]
    return job


def sample(client: Client, name: str) -> dict[str, Any]:
    made = client.generate(
        f"a <{name}> on grass", adapters=[name], seed=7, steps=3, num_images=2, wait=100
    )
    assert made["state"] == "succeeded", made
    return made


def check_pictures(client: Client, made: dict[str, Any], ref: str) -> None:
    assert made["bound_prompt"] == "a sks dog on grass"
    assert [version["ref"] for version in made["versions"]] == [ref]
    assert [image["seed"] for image in made["images"]] == [7, 8]
    pictures = [client.image(made["id"], number) for number in range(2)]
    opened = [Image.open(BytesIO(picture)) for picture in pictures]
    assert all(picture.size == (64, 64) for picture in opened)
    assert ref in opened[0].text["parameters"]
    assert pictures[0] != pictures[1]


def test_a_killed_workers_job_goes_on_from_its_checkpoint_and_registers_once(
    on_redis: Settings, tmp_path: Path
) -> None:
    with running(on_redis) as client:
        job_id = start_training(client, tmp_path, "rex", LONG)
        until(lambda: (on_redis.runs / job_id / "checkpoints" / "step-000020").is_dir())
        before = trainers_of(on_redis.home)
        (worker,) = (
            pid for pid, c in processes_of(on_redis.home).items() if "worker --queue train" in c
        )
        os.kill(worker, signal.SIGKILL)
        until(lambda: not before.keys() & trainers_of(on_redis.home).keys(), 10)

        done = client.wait(job_id)
        assert done["state"] == "succeeded"
        lost, *_, last = client.attempts(job_id)
        assert (lost["outcome"], last["outcome"]) == ("lost", "succeeded")
        assert last["resumed_step"] >= 20
        assert [version["version"] for version in client.adapter_versions("rex")] == [1]
        check_pictures(client, sample(client, "rex"), "rex@1")
    assert not processes_of(on_redis.home)


def test_a_stack_that_is_stopped_midway_goes_on_when_it_is_started_again(
    on_rabbitmq: Settings, tmp_path: Path
) -> None:
    with running(on_rabbitmq) as client:
        job_id = start_training(client, tmp_path, "rex", LONG)
        until(lambda: client.job(job_id)["progress"].get("step", 0) > 1)
    assert not processes_of(on_rabbitmq.home)

    with running(on_rabbitmq) as client:
        assert client.wait(job_id)["state"] == "succeeded"
        drained, *_, last = client.attempts(job_id)
        assert (drained["outcome"], last["outcome"]) == ("drained", "succeeded")
        assert last["resumed_step"] > 1
        assert [version["version"] for version in client.adapter_versions("rex")] == [1]
        check_pictures(client, sample(client, "rex"), "rex@1")


def test_cancellation_and_failure_midway_leave_no_version_and_no_process(
    embedded: Settings, tmp_path: Path
) -> None:
    with running(embedded) as client:
        job_id = start_training(client, tmp_path, "canceled", ENDLESS)
        until(lambda: client.job(job_id)["progress"].get("step", 0) > 1)
        assert client.cancel(job_id)["outcome"] == "requested"
        assert client.wait(job_id)["state"] == "canceled"
        assert not trainers_of(embedded.home)
        assert client.cancel(job_id)["outcome"] == "finished"

        # Weights multiplied by -1e30 in a step are soon no numbers any more.
        hopeless = {**QUICK, "steps": 50, "learning_rate": 1.0, "weight_decay": 1e30}
        job_id = start_training(client, tmp_path, "hopeless", hopeless)
        with pytest.raises(TrainingFailed, match=r"step \d+.*learning_rate"):
            client.wait(job_id)
        assert not trainers_of(embedded.home)
        assert list(client.adapters()) == []
