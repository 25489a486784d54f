"""One rank that trains several small runs in a row and writes down what each did.

    torchrun … tests/support_ranks.py FOLDER

FOLDER has `base/`, `photos/` and `scenarios.json`, and by their names the subject sets of `also`;
each rank leaves `rank<n>.json`. Importing torch and its company takes longer than these runs do: so
many runs share one launch.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lookalike_platform.files import sha256_file
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.run_request import MoreSubject, RunImage, RunRequest


@dataclass(frozen=True)
class Scenario:
    """One run. `resume`: start from the checkpoint `step` of another scenario.

    `breaks`: (step, rank, "loss" | "gradient") that becomes NaN there and then.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 0
    resume: tuple[str, int] | None = None
    breaks: tuple[int, int, str] | None = None
    method: str = "lora"


@dataclass(frozen=True)
class Outcome:
    """losses: of every step. weights: digest of all trainables after every step taken here.

    moved: by trainable, whether it changed. adapter: digest of the file. error: what stopped it.
    split: whether every parameter lies in shares over the processes between steps (ZeRO 3).
    """

    losses: list[float]
    weights: list[str]
    moved: dict[str, bool]
    frozen_kept: bool
    adapter: str | None
    error: dict[str, Any] | None
    split: bool


def launch(folder: Path, scenarios: list[Scenario], world: int) -> list[dict[str, Outcome]]:
    """Each rank's outcomes by scenario. `folder` already holds `base/` and `photos/`."""
    (folder / "scenarios.json").write_text(json.dumps([asdict(s) for s in scenarios]))
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"),
            __file__,
            str(folder),
        ],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    # What the ranks say comes before torchrun's own account.
    assert done.returncode == 0, done.stderr[-10_000:]
    return [
        {
            name: Outcome(**outcome)
            for name, outcome in json.loads((folder / f"rank{rank}.json").read_text()).items()
        }
        for rank in range(world)
    ]


def run_request(
    folder: Path,
    config: TrainingConfig,
    *,
    method: str = "lora",
    num_processes: int = 1,
    zero_stage: int = 0,
) -> RunRequest:
    """A request on the photos and the base in `folder`."""
    return RunRequest(
        job_id="job_1",
        owner="local",
        concept="robot",
        class_noun="dog",
        method=method,
        config=config.model_dump(),
        base_name="tiny",
        base_folder=folder / "base",
        base_fingerprint="tiny",
        base_family="sd1",
        prediction_type="epsilon",
        images=_images(folder / "photos"),
        cache=folder / "cache",
        device="cpu",
        num_processes=num_processes,
        zero_stage=zero_stage,
    )


def _images(folder: Path) -> list[RunImage]:
    return [RunImage(path=path, sha256=sha256_file(path)) for path in sorted(folder.iterdir())]


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    scenarios = [Scenario(**s) for s in json.loads((folder / "scenarios.json").read_text())]
    outcomes = {s.name: asdict(_train(folder, s)) for s in scenarios}
    (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)


def _train(folder: Path, scenario: Scenario) -> Outcome:
    import torch
    from accelerate.state import AcceleratorState

    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.data import Batch
    from lookalike_trainers.engine import make_engine
    from lookalike_trainers.loop import Diverged, train
    from lookalike_trainers.methods.find import builder_of
    from lookalike_trainers.methods.method import Card
    from lookalike_trainers.prepare import prepare
    from lookalike_trainers.subjects import subjects_of

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    info = next(info for info in METHODS if info.name == scenario.method)
    config = info.config(resolution=64, initializer="dog", **scenario.config)
    request = run_request(
        folder,
        config,
        method=scenario.method,
        num_processes=world,
        zero_stage=scenario.zero_stage,
    )
    request.also.extend(
        MoreSubject(class_noun="cat", images=_images(folder / name))
        for name in getattr(config, "also", ())
    )
    parts = BaseParts(request.base_folder, torch.device("cpu"))
    if config.token_vectors:
        for subject in subjects_of(request, config):
            parts.learn(subject.config.trigger, config.token_vectors)
    data, _ = prepare(request, config, parts, lambda message: None)
    torch.manual_seed(config.seed)
    method = builder_of(scenario.method)(parts, config)
    before = {name: p.detach().clone() for name, p in method.module.named_parameters()}
    # An Accelerator is one to a process; this makes room for the next run's.
    AcceleratorState._reset_state()
    _split_small_parameters_too()
    engine = make_engine(
        method.module,
        method.parameter_groups(),
        config,
        device=parts.device,
        world=world,
        zero_stage=scenario.zero_stage,
    )
    checkpoints = folder / f"checkpoints{world}" / scenario.name
    if scenario.resume and rank == 0:
        name, step = scenario.resume
        step_name = f"step-{step:06d}"
        shutil.copytree(checkpoints.parent / name / step_name, checkpoints / step_name)
    engine.barrier()

    weights: list[str] = []
    take_step, loss_of = engine.step, method.loss

    def step() -> float:
        norm = take_step()
        if engine.model.is_gradient_accumulation_boundary():
            weights.append(_digest(engine, method.module))
        return norm

    def broken(prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        loss = loss_of(prediction, batch)
        if scenario.breaks and (len(weights), rank) == tuple(scenario.breaks[:2]):
            if scenario.breaks[2] == "loss":
                return loss * float("nan")
            # The root's slope at zero is infinite, and infinity times zero is not a number.
            return loss + (prediction * 0).sum().abs().sqrt()
        return loss

    engine.step, method.loss = step, broken  # type: ignore[method-assign]
    losses, error = [], None
    try:
        trained = train(
            method, data, engine, config, checkpoints, lambda: False, lambda message: None
        )
        losses = [m["loss"] for m in trained.metrics]
    except Diverged as diverged:
        error = {
            "step": diverged.step,
            "what": diverged.what,
            "checkpoint": diverged.checkpoint,
            "detail": diverged.detail,
        }
    card = Card("t", "sd1", 64, config.trigger, "epsilon")
    adapter = None
    trainable = {n for n, p in method.module.named_parameters() if p.requires_grad}
    with engine.whole(method.module):
        if rank == 0 and error is None:
            result = folder / f"{scenario.name}-{world}"
            result.mkdir()
            adapter = sha256_file(method.save(result, card))
    split = all(hasattr(p, "ds_tensor") and not p.numel() for p in method.module.parameters())
    after = _values(method.module, scenario.zero_stage)
    frozen = [name for name in before if name not in trainable]
    return Outcome(
        losses=losses,
        weights=weights,
        moved={name: not torch.equal(before[name], after[name]) for name in sorted(trainable)},
        frozen_kept=all(torch.equal(before[name], after[name]) for name in frozen),
        adapter=adapter,
        error=error,
        split=split,
    )


def _values(module: Any, zero_stage: int) -> dict[str, Any]:
    """All parameters, those that do not train too, whole."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    everything = list(module.parameters())
    with GatheredParameters(everything) if zero_stage == 3 else nullcontext():
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def _split_small_parameters_too() -> None:
    """ZeRO 3 leaves parameters below 100,000 numbers whole: that is all of a tiny base."""
    from lookalike_trainers import engine

    asked = engine._deepspeed_config

    def config(*args: Any) -> dict[str, Any]:
        whole = asked(*args)
        whole["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return whole

    if asked.__name__ != "config":
        engine._deepspeed_config = config


def _digest(engine: Any, module: Any) -> str:
    import hashlib

    with engine.whole(module):
        trained = [p.detach().numpy().tobytes() for p in module.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(trained)).hexdigest()


if __name__ == "__main__":
    main()
