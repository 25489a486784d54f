"""An evaluation's own process: `python -m lookalike_trainers.evaluation.process FOLDER`. Torch.

It says on standard output, in JSON lines, what happens, and leaves `result.json` in the folder.
"""

import json
from pathlib import Path

from lookalike_platform.files import atomic_write
from lookalike_trainers.evaluation.request import EvaluationRequest
from lookalike_trainers.voice import Say, carry_out, teller


def run(folder: Path, say: Say) -> None:
    """Carry out the request in the folder.

    Raises LookalikeError, with what to do, where that is not possible; Stopped.
    """
    request = EvaluationRequest.model_validate_json((folder / "request.json").read_text())

    import torch

    from lookalike_platform.device import device_of
    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.evaluation.trial import evaluate

    torch.use_deterministic_algorithms(True, warn_only=True)
    say({"type": "stage", "stage": "evaluating"})
    parts = BaseParts(request.base_folder, device_of(request.device), request.cache)
    figures = evaluate(request, parts, teller(folder, say))
    atomic_write(folder / "result.json", json.dumps(figures, indent=1))


if __name__ == "__main__":
    carry_out(run)
