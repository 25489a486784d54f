"""Every method through torchrun and DeepSpeed: one process; two, and ZeRO 0, 2 and 3.

All runs of a number of processes share one launch (support_ranks.py).
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lookalike_trainers.catalog import METHODS
from support_images import photo
from support_methods import CARD, made
from support_models import save_base
from support_ranks import Outcome, Scenario, launch

pytestmark = pytest.mark.processes

NAMES = [info.name for info in METHODS]
OWN: dict[str, dict[str, Any]] = {
    # Plain LoRA is in test_processes.py: this is DoRA and pivotal tuning at once.
    "lora": {
        "dora": True,
        "targets": ["attention", "convolution"],
        "train_text_encoder": True,
        "token_vectors": 2,
        "gradient_checkpointing": True,
    },
}
STAGES = (0, 2, 3)
STEPS, SAVED = 2, 1
KEPT = ("weight/", "buffer/")  # what a checkpoint has of a module
SHORT = {
    "steps": STEPS,
    "batch_size": 1,
    "caption_dropout": 0.0,
    "checkpoint_every": SAVED,
    "keep_checkpoints": STEPS,
}


def scenarios(*, batch_size: int, stages: tuple[int, ...]) -> list[Scenario]:
    made = []
    for name in NAMES:
        config = SHORT | OWN.get(name, {}) | {"batch_size": batch_size}
        for stage in stages:
            run = f"{name} {stage}"
            made.append(Scenario(run, config, stage, method=name))
            made.append(Scenario(f"{run} resumed", config, stage, (run, SAVED), method=name))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(2):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Outcome]:
    return launch(folder, scenarios(batch_size=2, stages=(0,)), world=1)[0]


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Outcome]]:
    return launch(folder, scenarios(batch_size=1, stages=STAGES), world=2)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_it_declares_moves_and_nothing_else(alone: dict[str, Outcome], name: str) -> None:
    run = alone[f"{name} 0"]
    assert all(run.moved.values()), [name for name, moved in run.moved.items() if not moved]
    assert run.moved
    assert run.frozen_kept
    assert run.adapter


@pytest.mark.parametrize("name", NAMES)
def test_resumed_it_is_the_uninterrupted_run(alone: dict[str, Outcome], name: str) -> None:
    whole, resumed = alone[f"{name} 0"], alone[f"{name} 0 resumed"]
    assert resumed.losses == whole.losses
    assert resumed.weights == whole.weights[SAVED:]
    assert resumed.adapter == whole.adapter


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one_hold_the_same_weights_and_resume(
    alone: dict[str, Outcome], together: list[dict[str, Outcome]], name: str, stage: int
) -> None:
    first, second = (rank[f"{name} {stage}"] for rank in together)
    assert first.losses == pytest.approx(alone[f"{name} 0"].losses, abs=1e-5)
    assert first.weights == second.weights
    assert len(set(first.weights)) == STEPS
    assert all(first.moved.values())
    assert first.frozen_kept
    assert first.split == (stage == 3)
    resumed = together[0][f"{name} {stage} resumed"]
    assert resumed.losses == first.losses
    assert resumed.weights == first.weights[SAVED:]
    assert resumed.adapter == first.adapter


@pytest.mark.parametrize(("world", "stage"), [(1, 0), *((2, stage) for stage in STAGES)])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_of_the_last_checkpoint_and_alike_however_it_was_trained(
    folder: Path,
    alone: dict[str, Outcome],
    together: list[dict[str, Outcome]],
    tmp_path: Path,
    name: str,
    world: int,
    stage: int,
) -> None:
    untrained = saved(folder, name, {}, tmp_path / "untrained")
    last = folder / f"checkpoints{world}" / f"{name} {stage}" / f"step-{STEPS:06d}"
    rebuilt = saved(folder, name, load_file(last / "state.safetensors"), tmp_path / "rebuilt")
    found = adapter(folder / f"{name} {stage}-{world}")
    assert largest_gap(found, rebuilt, untrained) < 1e-3
    # Adam's steps are as long for a gradient of rounding errors alone, so some numbers differ.
    assert largest_gap(found, adapter(folder / f"{name} 0-1"), untrained) < 0.05


def largest_gap(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    untrained: dict[str, torch.Tensor],
) -> float:
    """How far a tensor is from what is expected, in lengths of what training was to change it."""
    assert found.keys() == expected.keys() == untrained.keys()
    gaps = []
    for key, tensor in expected.items():
        change = (tensor - untrained[key]).norm()
        if "perfusion.unet" in key and key.endswith("to_k"):  # locked to the class noun's answer
            torch.testing.assert_close(found[key], tensor)
        else:
            assert change, key
            gaps.append(float((found[key] - tensor).norm() / change))
    return max(gaps)


def saved(
    folder: Path, name: str, state: dict[str, torch.Tensor], place: Path
) -> dict[str, torch.Tensor]:
    """The file of a method that never ran, with the weights and buffers of a checkpoint."""
    method, start = fresh(folder / "base", name)
    kept = {key.split("/", 1)[1]: t for key, t in state.items() if key.startswith(KEPT)}
    assert not method.module.load_state_dict(start | kept, strict=False).unexpected_keys
    place.mkdir()
    return load_file(method.save(place, CARD))


@cache
def fresh(base: Path, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The method before its first step, and its tensors then."""
    method, _ = made(base, name, **OWN.get(name, {}))
    return method, {key: t.clone() for key, t in method.module.state_dict().items()}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
