"""One rank of a training run: `torchrun … -m lookalike_trainers.run RUN_FOLDER`. Imports torch.

Rank 0 says on standard output, in JSON lines, what happens (docs/architecture.md, run folder);
everything else that any rank or library prints goes to standard error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from lookalike_platform.errors import LookalikeError
from lookalike_platform.files import atomic_write, sha256_file
from lookalike_platform.process import die_with_parent
from lookalike_registry.check import check_file
from lookalike_registry.tensor_file import parameter_shapes
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.run_request import RunRequest
from lookalike_trainers.voice import Say, leave, speaker

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed")


def main() -> None:
    die_with_parent()
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    say = speaker(aloud=rank == 0)
    try:
        outcome = run(folder, say)
    except LookalikeError as error:
        say({"type": "error", "problem": error.problem(), **_where(error)})
        traceback.print_exc()
        leave(3)
    except Exception as error:
        if rank == 0:
            say({"type": "crash", "detail": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        leave(1)
    say({"type": "done", "outcome": outcome})
    leave(0)


def run(folder: Path, say: Say) -> str:
    """Carry out the request in the folder. Returns "complete" or "stopped".

    Raises LookalikeError, with what to do, where the run cannot go on.
    """
    request = RunRequest.model_validate_json((folder / "request.json").read_text())
    info = next(m for m in METHODS if m.name == request.method)
    config = info.config.model_validate(request.config)

    import torch

    device = _device(request.device)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)

    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.engine import check_optimizer, make_engine
    from lookalike_trainers.evaluation.encoder_folder import check_encoders
    from lookalike_trainers.loop import train
    from lookalike_trainers.methods.find import builder_of
    from lookalike_trainers.prepare import prepare
    from lookalike_trainers.prompts import validation_prompt
    from lookalike_trainers.subjects import subjects_of
    from lookalike_trainers.trainables import count
    from lookalike_trainers.validation import Validation

    # Before the work, not after it.
    check_encoders(request.clip_encoder, request.dino_encoder)
    check_optimizer(config, request.zero_stage)
    count(parameter_shapes(request.base_folder), config)
    world = int(os.environ["WORLD_SIZE"])
    parts = BaseParts(request.base_folder, device, request.cache)
    if config.token_vectors:
        for subject in subjects_of(request, config):
            parts.learn(subject.config.trigger, config.token_vectors)
    with _first_rank_first(folder):
        data, prior_digest = prepare(request, config, parts, say)

    torch.manual_seed(config.seed)  # the adapters' start does not depend on what was cached
    method = builder_of(request.method)(parts, config)
    engine = make_engine(
        method.module,
        method.parameter_groups(),
        config,
        device=device,
        world=world,
        zero_stage=request.zero_stage,
    )
    stop = folder / "stop"
    prompt = validation_prompt(config, request.class_noun)
    draw = Validation(engine, data, parts, config, prompt, folder / "validation", say)
    trained = train(method, data, engine, config, folder / "checkpoints", stop.exists, say, draw)
    if trained.outcome == "stopped":
        return "stopped"
    with engine.whole(method.module):
        if engine.rank == 0:
            adapter = _save_adapter(method, request, config, folder / "result")
    if engine.rank == 0:
        del engine, method
        _finish(request, config, adapter, trained.metrics, prior_digest, device, say)
    return "complete"


def _save_adapter(method: Any, request: RunRequest, config: TrainingConfig, result: Path) -> Path:
    from lookalike_trainers.methods.method import Card

    assert config.resolution is not None
    result.mkdir(exist_ok=True)
    card = Card(
        title=request.concept,
        family=request.base_family,
        resolution=config.resolution,
        trigger=config.trigger,
        prediction_type=request.prediction_type,
    )
    path: Path = method.save(result, card)
    check_file(path, request.base_folder)
    return path


def _finish(
    request: RunRequest,
    config: TrainingConfig,
    adapter: Path,
    metrics: list[dict[str, float]],
    prior_digest: str | None,
    device: Any,
    say: Say,
) -> None:
    """Try the adapter, and write the result; `result.json` comes last and means all is there."""
    from lookalike_trainers.evaluation.finished import try_out
    from lookalike_trainers.evaluation.scores import record

    result = adapter.parent
    lines = "".join(json.dumps(m) + "\n" for m in metrics)
    atomic_write(result / "metrics.jsonl", lines)
    say({"type": "stage", "stage": "evaluating"})
    grid, figures = try_out(request, config, adapter, device)
    summary = {
        "weights": adapter.name,
        "weights_sha256": sha256_file(adapter),
        "grid_sha256": sha256_file(grid),
        "evaluation": record(figures),
        "prior_digest": prior_digest,
        "final_loss": metrics[-1]["loss"],
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
    atomic_write(result / "result.json", json.dumps(summary, indent=1))


def _device(name: str) -> Any:
    import torch

    from lookalike_platform.device import device_of

    device = device_of(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def _first_rank_first(folder: Path) -> Iterator[None]:
    """Rank 0 goes in at once, the others when it is through: they find its work in the caches.

    The process group that could tell them is made later, with the engine; a file named after this
    launch does. Should rank 0 fail, torchrun ends those that wait.
    """
    rank = int(os.environ["RANK"])
    through = folder / f".cached-{os.environ['TORCHELASTIC_RUN_ID']}"
    while rank and not through.exists():
        time.sleep(0.05)
    yield
    if rank == 0:
        through.touch()


def _where(error: LookalikeError) -> dict[str, Any]:
    return {
        key: getattr(error, key) for key in ("step", "what", "checkpoint") if hasattr(error, key)
    }


if __name__ == "__main__":
    main()
