"""The options all methods share, many at a time: what one adds another must not undo.

All runs of a number of processes share one launch (support_ranks.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lookalike_trainers.base_parts import BaseParts
from support_images import encoded, picture
from support_methods import CPU
from support_models import save_base
from support_ranks import Outcome, Scenario, launch

pytestmark = pytest.mark.processes

STEPS, SAVED = 4, 2
SHORT = {
    "steps": STEPS,
    "checkpoint_every": SAVED,
    "keep_checkpoints": STEPS,
    "masked_loss": True,
    "aspect_buckets": True,
    "random_flip": True,
    "ema_decay": 0.5,
    "early_stopping": {"window": 2, "every": 1, "epsilon": 1e-9},
    "lr_scheduler": "cosine",
    "noise_offset": 0.05,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": (
        "custom_diffusion",
        {"also": ["set_cats"], "prior": {"num_images": 2, "steps": 2}, "sizes": 1},
    ),
    "preserving": ("svdiff", {"train_text_encoder": True, "output_preservation": {}}),
    "preserving a word": ("perfusion", {"output_preservation": {}, "crops": 1}),
}
STAGES = {"joint": 2, "preserving": 3, "preserving a word": 0}
"""The ZeRO stage of the run in two processes; every method's others are in its own test."""


def scenarios(*, together: bool) -> list[Scenario]:
    """Two processes with two micro-batches of one photo each, or one process with all four."""
    share = {"batch_size": 1, "gradient_accumulation_steps": 2} if together else {"batch_size": 4}
    made = []
    for name, (method, own) in CASES.items():
        config, stage = SHORT | own | share, STAGES[name] if together else 0
        made.append(Scenario(name, config, stage, method=method))
        resumed = Scenario(f"{name} resumed", config, stage, (name, SAVED), method=method)
        made += [resumed] if together else []
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut-outs of two shapes, of each subject two."""
    folder = tmp_path_factory.mktemp("together")
    save_base(folder / "base")
    for first, name in ((0, "photos"), (10, "set_cats")):
        (folder / name).mkdir()
        for number, size in enumerate([(96, 64), (80, 80)]):
            cut_out = picture(first + number, size).convert("RGBA")
            cut_out.paste((255, 255, 255, 0), (0, 0, size[0] // 2, size[1]))
            (folder / name / f"{number}.png").write_bytes(encoded(cut_out, "PNG"))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Outcome]:
    return launch(folder, scenarios(together=False), world=1)[0]


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Outcome]]:
    return launch(folder, scenarios(together=True), world=2)


def last(folder: Path, world: int, name: str) -> Path:
    return folder / f"checkpoints{world}" / name / f"step-{STEPS:06d}"


def measured(folder: Path, world: int, name: str) -> list[float]:
    metrics = json.loads((last(folder, world, name) / "metrics.json").read_text())
    return [point["evaluation_loss"] for point in metrics]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_measure_like_one(
    folder: Path, alone: dict[str, Outcome], together: list[dict[str, Outcome]], name: str
) -> None:
    first, second = (rank[name] for rank in together)
    assert first.losses == pytest.approx(alone[name].losses, abs=1e-5)
    assert measured(folder, 2, name) == pytest.approx(measured(folder, 1, name), abs=1e-5)
    assert len(measured(folder, 2, name)) == STEPS
    assert first.weights == second.weights
    for run in (first, alone[name]):
        assert all(run.moved.values()), [name for name, moved in run.moved.items() if not moved]
        assert run.frozen_kept


@pytest.mark.parametrize("name", CASES)
def test_resumed_they_are_the_uninterrupted_run(
    folder: Path, together: list[dict[str, Outcome]], name: str
) -> None:
    whole, resumed = together[0][name], together[0][f"{name} resumed"]
    assert resumed.losses == whole.losses
    assert resumed.weights == whole.weights[SAVED:]
    assert resumed.adapter == whole.adapter
    assert measured(folder, 2, f"{name} resumed") == measured(folder, 2, name)


@pytest.mark.parametrize("name", CASES)
def test_the_file_has_the_averages_not_the_last_steps_weights(
    folder: Path, together: list[dict[str, Outcome]], name: str
) -> None:
    state = load_file(last(folder, 2, name) / "state.safetensors")
    (file,) = (folder / f"{name}-2").glob("*.safetensors")
    kept = as_trained(load_file(file), BaseParts(folder / "base", CPU).unet)

    def has(tensor: torch.Tensor) -> bool:
        return any(
            t.shape == tensor.shape and torch.allclose(t, tensor, rtol=0, atol=1e-7) for t in kept
        )

    averages = {k.split("/", 1)[1]: t for k, t in state.items() if k.startswith("average/")}
    assert averages
    for key, average in averages.items():
        assert has(average), key
        assert not has(state[f"weight/{key}"]), key


def as_trained(tensors: dict[str, torch.Tensor], unet: Any) -> list[torch.Tensor]:
    """A file's tensors, whole weights where it has differences, and words one by one."""
    found = []
    for key, tensor in tensors.items():
        if key.startswith("delta.unet."):
            found.append(tensor + unet.get_parameter(key.removeprefix("delta.unet.")).detach())
        else:
            found += tensor.split(1) if key.startswith("tokens.") else [tensor]
    return found
