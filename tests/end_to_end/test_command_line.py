"""The command line as programs and people use it, on stacks of its own and on a kept one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lookalike_api.stack import find_stack, free_port
from lookalike_platform.settings import Settings
from support_stack import photos, processes_of, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

LOOKALIKE = [sys.executable, "-m", "lookalike_api.cli.main"]


@pytest.fixture
def environment(tmp_path: Path, tiny_base: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if "LOOKALIKE" not in name},
        "LOOKALIKE_HOME": str(tmp_path / "home"),
        "LOOKALIKE_DEFAULT_BASE": str(tiny_base),
        "LOOKALIKE_DEVICE": "cpu",
        "LOOKALIKE_API_PORT": str(free_port("127.0.0.1")),
    }


def lookalike(environment: dict[str, str], *arguments: object, code: int = 0) -> Any:
    """What a command prints on standard output, which is JSON and nothing else."""
    command = [*LOOKALIKE, *map(str, arguments), "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


def test_train_and_sample_start_a_stack_by_themselves_and_stop_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--set", "steps=4", "--set", "batch_size=1"]
    folder = photos(tmp_path / "rex")
    job = lookalike(environment, "train", folder, "-c", "dog", *options)
    assert job["state"] == "succeeded"
    assert job["result"]["ref"] == "rex@1"
    assert not processes_of(tmp_path / "home")

    asked = ["a <rex> on grass", "--adapter", "rex:0.8", "--seed", 5, "-n", 2, "--steps", 3]
    made = lookalike(environment, "sample", *asked, "--out", tmp_path / "out")
    assert [image["seed"] for image in made["images"]] == [5, 6]
    assert [(used["ref"], used["scale"]) for used in made["versions"]] == [("rex@1", 0.8)]
    assert len(made["files"]) == 2
    for file in made["files"]:
        with Image.open(file) as picture:
            assert picture.size == (64, 64)
    assert not processes_of(tmp_path / "home")

    nobody = lookalike(environment, "adapters", "list", code=1)
    assert "lookalike up" in nobody["detail"]


def test_a_stack_is_one_to_a_home_and_leaves_nothing_behind_however_it_ends(
    environment: dict[str, str], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    settings = Settings(home=home)
    for ending in (signal.SIGKILL, signal.SIGTERM):
        up = subprocess.Popen([*LOOKALIKE, "up"], env=environment)
        url = until(lambda: find_stack(settings), 60)
        assert environment["LOOKALIKE_API_PORT"] in url
        assert lookalike(environment, "jobs", "list") == []
        refused = lookalike(environment, "up", code=1)
        assert url in refused["detail"]
        os.kill(up.pid, ending)
        assert up.wait(30) == (-ending if ending == signal.SIGKILL else 0)
        until(lambda: not processes_of(home), 10)


def test_a_port_that_is_taken_is_said_with_what_to_do(
    environment: dict[str, str], tmp_path: Path
) -> None:

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = lookalike(environment, "up", "--port", port, code=1)
    assert f"--port {port + 1}" in refused["detail"]
    assert not processes_of(tmp_path / "home")
