"""An evaluation's own process: `python -m lookalike_trainers.evaluation.process FOLDER`. Torch.

It says on standard output, in JSON lines, what happens, and leaves `result.json` in the folder.
"""

import json
from pathlib import Path

from lookalike_platform.files import atomic_write
from lookalike_trainers.evaluation.request import EvaluationRequest
from lookalike_trainers.launcher import STOP_FILE
from lookalike_trainers.voice import Say, Stopped, carry_out


def run(folder: Path, say: Say) -> None:
    """Carry out the request in the folder.

    Raises LookalikeError, with what to do, where that is not possible; Stopped.
    """
    request = EvaluationRequest.model_validate_json((folder / "request.json").read_text())

    import torch

    from lookalike_trainers.base_parts import BaseParts
    from lookalike_trainers.evaluation.trial import evaluate

    torch.use_deterministic_algorithms(True, warn_only=True)
    name = request.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    say({"type": "stage", "stage": "evaluating"})

    def on_picture(done: int, total: int) -> None:
        if (folder / STOP_FILE).exists():
            raise Stopped
        say({"type": "progress", "step": done, "total": total})

    parts = BaseParts(request.base_folder, torch.device(name), request.cache)
    figures = evaluate(request, parts, on_picture)
    atomic_write(folder / "result.json", json.dumps(figures, indent=1))


if __name__ == "__main__":
    carry_out(run)
