"""Checkpoints on the disk: whole or absent, whatever happens while one is written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lookalike_trainers import checkpoint
from lookalike_trainers.engine import Engine


def fresh_engine() -> tuple[Engine, nn.Module]:
    """One process without ZeRO: what the engine wraps is a plain optimiser."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    engine = Engine(
        model=None,
        optimizer=SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups),
        base_rates=[0.1],
        max_grad_norm=1.0,
        rank=0,
        world=1,
        zero_stage=0,
        device=torch.device("cpu"),
    )
    return engine, module


def train(engine: Engine, module: nn.Module, steps: int) -> None:
    for step in range(steps):
        module(torch.full((1, 3), float(step))).square().sum().backward()
        engine.optimizer.optimizer.step()
        module.zero_grad()


def write(folder: Path, engine: Engine, module: nn.Module, step: int, keep: int = 2) -> None:
    metrics = [{"step": float(number + 1), "loss": 1 / (number + 1)} for number in range(step)]
    checkpoint.write(engine, module, folder, step, metrics, keep)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 2 and 4."""
    engine, module = fresh_engine()
    for step in (2, 4):
        train(engine, module, 2)
        write(tmp_path, engine, module, step)
    return tmp_path


def test_weights_moments_and_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    engine, module = fresh_engine()
    train(engine, module, 3)
    write(tmp_path, engine, module, 3)
    again, other = fresh_engine()
    step, metrics = checkpoint.load_newest(again, other, tmp_path)
    assert (step, len(metrics), metrics[-1]["loss"]) == (3, 3, 1 / 3)
    train(engine, module, 2)
    train(again, other, 2)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_only_what_was_trained_is_kept_and_no_pickle(two: Path) -> None:
    assert saved(two / "step-000004") == ["manifest.json", "metrics.json", "state.safetensors"]
    keys = load_file(two / "step-000004" / "state.safetensors").keys()
    of = ("exp_avg", "exp_avg_sq", "weight")
    assert set(keys) == {
        "step",
        *(f"{kind}/1.{name}" for kind in of for name in ("weight", "bias")),
    }


def test_the_newest_ones_stay(tmp_path: Path) -> None:
    engine, module = fresh_engine()
    train(engine, module, 1)
    for step in (1, 2, 3):
        write(tmp_path, engine, module, step, keep=2)
    assert saved(tmp_path) == ["step-000002", "step-000003"]


def test_without_a_checkpoint_a_run_starts_at_the_beginning(tmp_path: Path) -> None:
    assert checkpoint.load_newest(*fresh_engine(), tmp_path / "none") == (0, [])


@pytest.mark.parametrize("file", ["state.safetensors", "metrics.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    two: Path, file: str, damage: str
) -> None:
    path = two / "step-000004" / file
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    newest = checkpoint.newest_valid(two)
    # One flipped bit in the manifest's JSON may leave it readable, but then a digest is wrong.
    assert newest is not None
    assert newest.name == "step-000002"


@pytest.mark.parametrize("last", ["state.safetensors", "metrics.json", "manifest.json"])
def test_a_save_that_is_interrupted_leaves_the_one_before(
    two: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    write_file = checkpoint.atomic_write

    def interrupted(path: Path, data: Any) -> None:
        if path.name == last:
            raise KeyboardInterrupt
        write_file(path, data)

    monkeypatch.setattr(checkpoint, "atomic_write", interrupted)
    engine, module = fresh_engine()
    train(engine, module, 6)
    with pytest.raises(KeyboardInterrupt):
        write(two, engine, module, 6)
    assert checkpoint.load_newest(*fresh_engine(), two)[0] == 4
    monkeypatch.undo()
    write(two, engine, module, 6)
    assert saved(two) == ["step-000004", "step-000006"]


def test_a_checkpoint_is_named_only_when_its_files_are_on_the_disk(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_whole_checkpoints(path: Path) -> None:
        if "manifest.json" in saved(path):
            raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "_sync", fails_on_whole_checkpoints)
    engine, module = fresh_engine()
    train(engine, module, 6)
    with pytest.raises(OSError, match="disk"):
        write(two, engine, module, 6)
    assert not (two / "step-000006").exists()
    assert checkpoint.load_newest(*fresh_engine(), two)[0] == 4


def test_a_checkpoint_of_other_trainables_is_refused(two: Path) -> None:
    engine, _ = fresh_engine()
    wider = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    with pytest.raises(KeyError, match="weight/0"):
        checkpoint.load_newest(engine, wider, two)
