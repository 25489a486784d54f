"""Options that change the course of a run, in two processes: averages, early stopping."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lookalike_platform.errors import CapabilityMissing
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_trainers import engine
from lookalike_trainers.method_configs import LoraConfig
from support_images import photo
from support_models import save_base
from support_ranks import Outcome, Scenario, launch

pytestmark = pytest.mark.processes

SAVED, STEPS, DECAY = 2, 4, 0.2
AVERAGED = {
    "steps": STEPS,
    "batch_size": 2,
    "rank": 2,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
    "ema_decay": DECAY,
}
WINDOW, EPSILON = 2, 0.05
EARLY = {
    "steps": 40,
    "batch_size": 2,
    "rank": 2,
    "checkpoint_every": SAVED,
    "keep_checkpoints": 40,
    "early_stopping": {"window": WINDOW, "epsilon": EPSILON, "every": 1},
}
DREAMBOOTH = {"steps": STEPS, "batch_size": 2, "checkpoint_every": SAVED, "learning_rate": 1e-4}
EIGHT_BIT = DREAMBOOTH | {"optimizer": "adamw8bit"}
SCENARIOS = [
    *(Scenario(f"average {stage}", AVERAGED, stage) for stage in (0, 2, 3)),
    *(
        Scenario(f"average {stage} resumed", AVERAGED, stage, (f"average {stage}", SAVED))
        for stage in (0, 2, 3)
    ),
    Scenario("early", EARLY),
    Scenario("early resumed", EARLY, resume=("early", SAVED)),
    Scenario("early, zero 3", EARLY, 3),
]
EIGHT_BIT_SCENARIOS = [
    Scenario("32 bits", DREAMBOOTH, method="dreambooth"),
    Scenario("8 bits", EIGHT_BIT, method="dreambooth"),
    Scenario("8 bits resumed", EIGHT_BIT, resume=("8 bits", SAVED), method="dreambooth"),
]
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Outcome]]:
    return launch(folder, SCENARIOS + EIGHT_BIT_SCENARIOS * HAS_BITSANDBYTES, world=2)


def states(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    steps = sorted((folder / "checkpoints2" / name).iterdir())
    return [load_file(step / "state.safetensors") for step in steps]


def measured(folder: Path, name: str) -> list[float]:
    last = max((folder / "checkpoints2" / name).iterdir())
    metrics: list[dict[str, Any]] = json.loads((last / "metrics.json").read_text())
    return [point["evaluation_loss"] for point in metrics]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_adapter_is_the_average_over_the_steps_whatever_the_stage(
    ranks: list[dict[str, Outcome]], folder: Path, stage: int
) -> None:
    """From the weights of each step: B starts at zero, and so does its average."""
    name = f"average {stage}"
    assert ranks[0][name].error is None
    steps = states(folder, name)
    adapter = list(load_file(folder / f"{name}-2" / WEIGHTS_NAME).values())
    ups = [key.removeprefix("weight/") for key in steps[0] if "weight/" in key and "lora_B" in key]
    assert ups
    for key in ups:
        naive = torch.zeros_like(steps[0][f"weight/{key}"])
        for n, state in enumerate(steps, 1):
            decay = min(DECAY, (1 + n) / (10 + n))
            naive = decay * naive + (1 - decay) * state[f"weight/{key}"]
        found = steps[-1][f"average/{key}"]
        torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-8)
        assert any(t.shape == found.shape and torch.equal(t, found) for t in adapter)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_has_the_same_average_to_the_bit(
    ranks: list[dict[str, Outcome]], stage: int
) -> None:
    whole, resumed = ranks[0][f"average {stage}"], ranks[0][f"average {stage} resumed"]
    assert resumed.adapter == whole.adapter


def test_training_stops_where_the_rule_says_from_the_losses_of_fixed_samples(
    ranks: list[dict[str, Outcome]], folder: Path
) -> None:
    losses = measured(folder, "early")
    assert WINDOW < len(losses) < 40
    assert len(ranks[0]["early"].losses) == len(ranks[1]["early"].losses) == len(losses)

    def ratio(count: int) -> float:
        seen = losses[:count]
        return statistics.pvariance(seen[-WINDOW:]) / statistics.pvariance(seen)

    assert ratio(len(losses)) < EPSILON
    assert all(ratio(count) >= EPSILON for count in range(WINDOW + 1, len(losses)))
    assert losses[-1] < losses[0]


def test_a_resumed_run_stops_at_the_same_step_with_the_same_weights(
    ranks: list[dict[str, Outcome]], folder: Path
) -> None:
    whole, resumed = ranks[0]["early"], ranks[0]["early resumed"]
    assert resumed.losses == whole.losses
    assert resumed.adapter == whole.adapter
    assert measured(folder, "early resumed") == measured(folder, "early")


def test_shares_of_the_weights_are_measured_as_the_whole_ones_are(
    ranks: list[dict[str, Outcome]], folder: Path
) -> None:
    assert ranks[0]["early, zero 3"].error is None
    shared, whole = measured(folder, "early, zero 3"), measured(folder, "early")
    assert shared[:5] == pytest.approx(whole[:5], abs=1e-5)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="an extra: pip install 'lookalike[eight-bit]'")
def test_eight_bit_moments_train_nearly_alike_and_come_back_byte_for_byte(
    ranks: list[dict[str, Outcome]], folder: Path
) -> None:
    plain, small, resumed = (ranks[0][n] for n in ("32 bits", "8 bits", "8 bits resumed"))
    assert small.losses == pytest.approx(plain.losses, rel=0.01)
    assert small.losses[1:] != plain.losses[1:]
    kept = states(folder, "8 bits")[0]
    assert any(t.dtype == torch.uint8 for key, t in kept.items() if key.startswith("state1/"))
    assert resumed.losses == small.losses
    assert resumed.weights == small.weights[SAVED:]
    assert resumed.adapter == small.adapter
    assert ranks[1]["8 bits"].weights == small.weights


@pytest.mark.parametrize(("stage", "what"), [(2, "ZeRO 2"), (0, "bitsandbytes")])
def test_eight_bit_moments_that_cannot_be_had_say_what_to_do(
    stage: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = LoraConfig(optimizer="adamw8bit")
    with pytest.raises(CapabilityMissing, match=f"{what}.*optimizer to adamw"):
        engine._optimizer([], config, stage)


def test_eight_bit_moments_are_not_asked_for_in_shares() -> None:
    with pytest.raises(ValidationError, match=r"zero_stage: .*set it to 0, or optimizer"):
        LoraConfig(optimizer="adamw8bit", zero_stage=2)
    assert LoraConfig(optimizer="adamw8bit", zero_stage=0).zero_stage == 0
