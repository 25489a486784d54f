"""A merge's own process: `python -m lookalike_trainers.composition.process FOLDER`. Torch.

It says on standard output, in JSON lines, what happens, and leaves the merged adapter in the
folder's `result/`, with `result.json` written last.
"""

import json
from importlib import metadata
from pathlib import Path

from lookalike_platform.files import atomic_write, sha256_file
from lookalike_registry.check import check_file
from lookalike_trainers.composition.request import CompositionRequest
from lookalike_trainers.launcher import STOP_FILE
from lookalike_trainers.voice import Say, Stopped, carry_out

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


def run(folder: Path, say: Say) -> None:
    """Carry out the request in the folder.

    Raises LookalikeError, with what to do, where that is not possible; Stopped.
    """
    request = CompositionRequest.model_validate_json((folder / "request.json").read_text())

    import torch

    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.composition.merging import merge
    from lookalike_trainers.methods.composition import save
    from lookalike_trainers.methods.method import Card

    torch.use_deterministic_algorithms(True, warn_only=True)
    name = request.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    say({"type": "stage", "stage": "composing"})

    def go_on_unless_stopped() -> None:
        if (folder / STOP_FILE).exists():
            raise Stopped

    def on_step(done: int, total: int) -> None:
        go_on_unless_stopped()
        say({"type": "progress", "step": done, "total": total})

    parts = BaseParts(request.base_folder, torch.device(name), request.cache)
    result = folder / "result"
    result.mkdir(exist_ok=True)
    card = Card(
        title=request.name,
        family=request.family,
        resolution=request.resolution,
        trigger=request.parents[0].subjects[0].trigger,
        prediction_type=request.prediction_type,
    )
    weights = save(merge(request, parts, on_step), result, card)
    check_file(weights, request.base_folder)
    go_on_unless_stopped()
    summary = {
        "weights": weights.name,
        "weights_sha256": sha256_file(weights),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
    atomic_write(result / "result.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    carry_out(run)
