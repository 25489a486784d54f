"""The training loop. It knows no method by name. Torch."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lookalike_platform.errors import LookalikeError
from lookalike_trainers import checkpoint
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import TrainingData
from lookalike_trainers.early_stopping import LOSS as EVALUATION_LOSS
from lookalike_trainers.early_stopping import evaluation_loss, settled
from lookalike_trainers.engine import Engine
from lookalike_trainers.methods.method import Method

Say = Callable[[dict[str, Any]], None]
REPORT_SECONDS = 0.5


@dataclass
class Diverged(LookalikeError):
    """The loss or the gradient is no longer a number."""

    step: int = 0
    what: str = "loss"
    checkpoint: int | None = None

    slug = "diverged"
    title = "Training diverged"


@dataclass(frozen=True)
class Trained:
    """How the loop ended; metrics: {"step", "loss", "learning_rate", "time"} of every step, and
    "evaluation_loss" where early stopping measured it."""

    outcome: Literal["complete", "stopped"]
    metrics: list[dict[str, float]]


def train(
    method: Method,
    data: TrainingData,
    engine: Engine,
    config: TrainingConfig,
    checkpoints: Path,
    should_stop: Callable[[], bool],
    say: Say,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train from the newest valid checkpoint, or from the start, to `config.steps` or to where
    early stopping finds nothing more to learn. The weights it leaves are those of the adapter.

    Args:
        should_stop: asked on rank 0 before each step; all processes then save and stop together.
        on_step: called in all processes with the number of steps done, after each.

    Raises:
        Diverged: on all processes; the newest checkpoint is one from before.
    """
    first, metrics = checkpoint.load_newest(engine, method.module, checkpoints)
    if first:
        say({"type": "resumed", "step": first})
    say({"type": "stage", "stage": "training"})
    started = reported = time.monotonic()
    saved = first

    def save(step: int) -> None:
        nonlocal saved
        checksum = engine.checksum(method.module)
        if not checksum.isfinite().all():
            raise _diverged("weights", step - 1, config, saved)
        engine.check_ranks_agree(checksum)
        checkpoint.write(engine, method.module, checkpoints, step, metrics, config.keep_checkpoints)
        saved = step
        say({"type": "checkpoint", "step": step})

    fixed = [b.to(engine.device) for b in data.evaluation()] if config.early_stopping else []
    done = settled(metrics, config.early_stopping)
    step = first
    while step < config.steps and not done:
        factor = learning_rate_factor(config, step)
        engine.set_learning_rates(factor)
        wants_stop = engine.rank == 0 and should_stop()
        loss, stopped = optimizer_step(method, data, engine, config, step, wants_stop, saved)
        if stopped:
            if step > saved:
                save(step)
            return Trained("stopped", metrics)
        metrics.append(
            {
                "step": step + 1,
                "loss": loss,
                "learning_rate": getattr(config, config.rate) * factor,
                "time": time.time(),
            }
        )
        step += 1
        if config.early_stopping and step % config.early_stopping.every == 0:
            metrics[-1][EVALUATION_LOSS] = evaluation_loss(engine, fixed)
        done = step == config.steps or settled(metrics, config.early_stopping)
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS or step == first + 1 or done:
            reported = now
            total = step if done else config.steps
            say(_progress(metrics[-1], total, (now - started) / (step - first)))
        if step % config.checkpoint_every == 0 or done:
            save(step)
        on_step(step)
    if step < config.steps:
        text = f"The loss has levelled off: stopped after {step} of {config.steps} steps."
        say({"type": "message", "level": "info", "text": text})
    if engine.average:
        engine.average.take_over()
    return Trained("complete", metrics)


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """The schedule's factor of the learning rates at `step` (from 0), a pure function of it."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler == "cosine" else 1 - done


def optimizer_step(
    method: Method,
    data: TrainingData,
    engine: Engine,
    config: TrainingConfig,
    step: int,
    wants_stop: bool,
    saved: int,
) -> tuple[float, bool]:
    """One optimiser step. The loss of the global batch, or that a stop was asked for instead."""
    accumulation = config.gradient_accumulation_steps
    total = norm = 0.0
    for micro in range(accumulation):
        batch = data.batch(step, micro, engine.rank, engine.world).to(engine.device)
        loss = method.loss(batch.answered_by(engine.model), batch)
        # One round tells all processes the loss, whether it is a number, and whether to stop.
        value = float(loss.detach())
        finite = math.isfinite(value)
        shared = [value if finite else 0.0, float(not finite), float(wants_stop)]
        summed, broken, stops = engine.sum(shared)
        if broken:
            raise _diverged("loss", step, config, saved)
        if stops and micro == 0:
            return 0.0, True
        total += summed / engine.world / accumulation
        engine.backward(loss)
        norm = engine.step()
    if not math.isfinite(norm):
        raise _diverged("gradient", step, config, saved)
    return total, False


def _diverged(what: str, step: int, config: TrainingConfig, saved: int) -> Diverged:
    rate = getattr(config, config.rate)
    cause = f"a learning rate of {rate:g} is too high for this base"
    if config.mixed_precision == "bf16":
        cause += ", or bf16 too coarse"
    remedy = f"try {config.rate} {rate / 10:g}"
    if config.mixed_precision == "bf16":
        remedy += ', or mixed_precision "no"'
    kept = f"The checkpoint of step {saved} is kept." if saved else "No checkpoint had been made."
    return Diverged(
        f"The {what} became infinite or not a number in step {step + 1}. Likely {cause}: {remedy}. "
        f"{kept}",
        step=step + 1,
        what=what,
        checkpoint=saved or None,
    )


def _progress(last: dict[str, float], total: int, seconds_a_step: float) -> dict[str, Any]:
    step = int(last["step"])
    return {
        "type": "progress",
        "step": step,
        "total": total,
        "loss": last["loss"],
        "learning_rate": last["learning_rate"],
        "steps_per_second": 1 / max(seconds_a_step, 1e-9),
        "seconds_left": (total - step) * seconds_a_step,
    }
