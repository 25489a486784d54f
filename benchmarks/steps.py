"""Training steps on the bundled base that benchmarks let take turns: ours, and the bare one.

Import it before torch: it says that this process is alone and trains on the CPU.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}

import torch
from accelerate.state import AcceleratorState

from lookalike_platform import bases
from lookalike_platform.files import sha256_file
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import TrainingData
from lookalike_trainers.engine import make_engine
from lookalike_trainers.loop import optimizer_step
from lookalike_trainers.methods.find import builder_of
from lookalike_trainers.prepare import prepare
from lookalike_trainers.run_request import RunImage, RunRequest

DEMO = Path(__file__).parents[1] / "api/lookalike_api/demo/bibo"
CLASS_NOUN = "robot"
WARM_UP = 3
Step = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """A method's run as a rank has it before its first step."""

    name: str
    config: TrainingConfig
    folder: Path
    cache: Path
    data: TrainingData

    def parts(self) -> BaseParts:
        """The base, afresh."""
        parts = BaseParts(self.folder, torch.device("cpu"), self.cache)
        if self.config.token_vectors:
            parts.learn(self.config.trigger, self.config.token_vectors)
        return parts

    def method(self) -> Any:
        torch.manual_seed(0)
        return builder_of(self.name)(self.parts(), self.config)


def prepared(name: str, photos: Path, home: Path) -> Run:
    """The method with its defaults, on a folder of photos."""
    settings = Settings(home=home)
    base = bases.resolve("pocket-64", settings)
    info = next(info for info in METHODS if info.name == name)
    config = info.config(resolution=base.resolution, initializer=CLASS_NOUN)
    request = RunRequest(
        job_id="benchmark",
        owner="benchmark",
        concept="benchmark",
        class_noun=CLASS_NOUN,
        method=name,
        config=config.model_dump(mode="json"),
        base_name=base.name,
        base_folder=base.folder,
        base_fingerprint=base.fingerprint,
        base_family=base.family,
        prediction_type=base.prediction_type,
        images=[RunImage(path=p, sha256=sha256_file(p)) for p in pictures(photos)],
        cache=settings.cache,
        device="cpu",
    )
    return prepare_run(request, config)


def prepare_run(request: RunRequest, config: TrainingConfig) -> Run:
    """The caches filled, as a rank does it."""
    parts = BaseParts(request.base_folder, torch.device("cpu"), request.cache)
    if config.token_vectors:
        parts.learn(config.trigger, config.token_vectors)
    data, _ = prepare(request, config, parts, lambda message: None)
    return Run(request.method, config, request.base_folder, request.cache, data)


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in {".png", ".jpg", ".webp"})


def ours(run: Run) -> Step:
    """The loop's own step: data from the caches, DeepSpeed engine (ZeRO 0, one process)."""
    method = run.method()
    AcceleratorState._reset_state()  # an Accelerator is one to a process
    engine = make_engine(
        method.module,
        method.parameter_groups(),
        run.config,
        device=torch.device("cpu"),
        world=1,
        zero_stage=0,
    )

    def step(number: int) -> None:
        optimizer_step(method, run.data, engine, run.config, number, False, 0)

    return step


def bare(run: Run) -> Step:
    """Forward, backward, clipping and AdamW step on one batch of cached inputs, nothing else."""
    method = run.method()
    trainables = [p for group in method.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.AdamW(
        method.parameter_groups(), weight_decay=run.config.weight_decay, fused=True
    )
    batch = run.data.batch(0, 0, 0, 1)

    def step(number: int) -> None:
        method.loss(batch.answered_by(method.module), batch).backward()
        torch.nn.utils.clip_grad_norm_(trainables, run.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def medians(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Seconds of each step, the median of the rounds in which they took turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
