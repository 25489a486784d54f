"""A run as the worker starts it: torchrun, two processes, JSON lines, files in the run folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from lookalike_platform.files import sha256_file
from lookalike_registry.adapter_file import WEIGHTS_NAME, check_against_base
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.launcher import launch
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.lora import wear
from lookalike_trainers.painting import paint
from support_images import photo
from support_models import save_base
from support_ranks import run_request

pytestmark = [
    pytest.mark.processes,
    # diffusers' samplers, under NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(photo(number))
    return tmp_path


def carry_out(folder: Path, processes: int, stage: int, **config: Any) -> tuple[int, list[Any]]:
    """The exit code, and what rank 0 said."""
    request = run_request(
        folder,
        LoraConfig(resolution=64, rank=2, **config),
        num_processes=processes,
        zero_stage=stage,
    )
    running = launch(request, folder / "run")
    said = list(running.messages())
    return running.popen.returncode, said


def test_two_processes_with_shared_weights_train_evaluate_and_leave_a_result(folder: Path) -> None:
    """Stage 3, the text encoder and prior images: whatever shares weights must give them back."""
    code, said = carry_out(
        folder,
        2,
        3,
        steps=3,
        batch_size=1,
        train_text_encoder=True,
        prior={"num_images": 2, "steps": 2},
        validation={"every": 3, "seed": 5},
    )
    assert code == 0, (folder / "run" / "log.txt").read_text()[-4000:]
    stages = [m["stage"] for m in said if m["type"] == "stage"]
    assert stages == ["caching", "prior", "training", "evaluating"]
    steps = [m for m in said if m["type"] == "progress"]
    assert (steps[0]["step"], steps[-1]["step"], steps[-1]["total"]) == (1, 3, 3)
    assert [m["step"] for m in said if m["type"] == "checkpoint"] == [3]
    assert said[-1] == {"type": "done", "outcome": "complete"}

    result = folder / "run" / "result"
    summary = json.loads((result / "result.json").read_text())
    assert summary["weights_sha256"] == sha256_file(result / WEIGHTS_NAME)
    assert summary["grid_sha256"] == sha256_file(result / "samples.png")
    header = check_against_base(result / WEIGHTS_NAME, folder / "base")
    assert {key.partition(".")[0] for key in header.tensors} == {"unet", "text_encoder"}
    metrics = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert summary["final_loss"] == metrics[-1]["loss"]
    with Image.open(result / "samples.png") as grid:
        assert grid.width == 4 * 64  # two seeds of the base beside two of the adapter

    # What it drew on the way is what its adapter paints afterwards.
    (drawn,) = (m for m in said if m["type"] == "validation")
    assert drawn["step"] == 3
    parts = BaseParts(folder / "base", torch.device("cpu"))
    wear(parts, result / WEIGHTS_NAME, 1.0, "sks")
    ((painted,),) = paint(parts, ["a sks dog"], [5], 64)
    with Image.open(drawn["file"]) as picture:
        difference = ImageChops.difference(picture, painted)
    assert max(high for _, high in difference.getextrema()) <= 2


def test_a_run_that_diverges_says_step_cause_and_remedy_and_leaves_no_result(folder: Path) -> None:
    """A base whose answers are too large to be squared: the first loss is infinite."""
    path = folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], 1e30)
    save_file(weights, path)
    code, said = carry_out(folder, 1, 0, steps=3, batch_size=1)
    assert code != 0
    error = said[-1]
    assert (error["type"], error["step"], error["what"]) == ("error", 1, "loss")
    assert "learning rate of 0.001" in error["problem"]["detail"]
    assert "No checkpoint had been made" in error["problem"]["detail"]
    assert not (folder / "run" / "result" / "result.json").exists()


def test_an_optimiser_that_cannot_be_had_ends_the_run_before_its_work(folder: Path) -> None:
    """The stage is the operator's: the config alone does not say."""
    code, said = carry_out(
        folder, 1, 2, steps=3, optimizer="adamw8bit", prior={"num_images": 2, "steps": 2}
    )
    assert code != 0
    assert [message["type"] for message in said] == ["error"]
    assert "adamw8bit with ZeRO 2" in said[0]["problem"]["detail"]


def test_what_the_base_has_no_room_for_ends_the_run_before_its_work(folder: Path) -> None:
    code, said = carry_out(folder, 1, 0, targets=("to_z",), prior={"num_images": 2, "steps": 2})
    assert code != 0
    assert [message["type"] for message in said] == ["error"]
    assert said[0]["problem"]["errors"][0]["path"] == "config.targets"
