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
from lookalike_trainers.voice import Say, carry_out, stop_if_asked, teller

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


def run(folder: Path, say: Say) -> None:
    """Carry out the request in the folder.

    Raises LookalikeError, with what to do, where that is not possible; Stopped.
    """
    request = CompositionRequest.model_validate_json((folder / "request.json").read_text())

    import torch

    from lookalike_platform.device import device_of
    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.composition.merging import merge
    from lookalike_trainers.methods.composition import save
    from lookalike_trainers.methods.method import Card

    torch.use_deterministic_algorithms(True, warn_only=True)
    say({"type": "stage", "stage": "composing"})
    parts = BaseParts(request.base_folder, device_of(request.device), request.cache)
    result = folder / "result"
    result.mkdir(exist_ok=True)
    card = Card(
        title=request.name,
        family=request.family,
        resolution=request.resolution,
        trigger=request.parents[0].subjects[0].trigger,
        prediction_type=request.prediction_type,
    )
    weights = save(merge(request, parts, teller(folder, say)), result, card)
    check_file(weights, request.base_folder)
    stop_if_asked(folder)
    summary = {
        "weights": weights.name,
        "weights_sha256": sha256_file(weights),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
    atomic_write(result / "result.json", json.dumps(summary, indent=1))


if __name__ == "__main__":
    carry_out(run)
