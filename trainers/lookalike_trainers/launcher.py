"""Starting a job's processes and listening to them. Torch-free: workers import it.

worker ─→ torchrun --standalone ─→ rank 0, rank 1, …      or  worker ─→ python -m MODULE
  ↑──────── JSON lines ──────────────┘                          ↑─ JSON lines ─┘
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lookalike_platform.process import COMPUTE, spawn_group, stop_group
from lookalike_trainers.composition.request import CompositionRequest
from lookalike_trainers.evaluation.request import EvaluationRequest
from lookalike_trainers.run_request import RunRequest

log = logging.getLogger(__name__)

STOP_FILE = "stop"
LOG_FILE = "log.txt"


@dataclass
class Launch:
    """A running group of processes that do one job."""

    popen: "subprocess.Popen[bytes]"
    folder: Path

    def messages(self) -> Iterator[dict[str, Any]]:
        """What rank 0 says, until all processes have ended."""
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    log.warning("the trainer said something that is not JSON: %r", line[:200])
                    continue
                if isinstance(message, dict) and "type" in message:
                    yield message
        self.popen.wait()

    def ask_to_stop(self, why: str) -> None:
        """Have the run save a checkpoint after its current step and end. `why`: cancel | drain."""
        (self.folder / STOP_FILE).write_text(why)

    def kill(self, grace: float) -> None:
        stop_group(self.popen, grace)

    def log_tail(self, lines: int = 20) -> str:
        """The end of what the processes printed, for people who look for a cause."""
        try:
            text = (self.folder / LOG_FILE).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def launch(request: RunRequest, folder: Path) -> Launch:
    """Write the request into the run folder and start a training's ranks on it."""
    _write(request, folder)
    return start(
        folder,
        command(folder, request.num_processes),
        environment(request.device, request.num_processes),
    )


def launch_module(
    module: str, request: EvaluationRequest | CompositionRequest, folder: Path
) -> Launch:
    """Write the request into the run folder and start `python -m MODULE FOLDER` on it."""
    _write(request, folder)
    argv = [sys.executable, "-m", module, str(folder)]
    return start(folder, argv, environment(request.device))


def start(folder: Path, argv: list[str], env: dict[str, str]) -> Launch:
    """Start a program that says on standard output, in JSON lines, what happens."""
    (folder / STOP_FILE).unlink(missing_ok=True)
    with (folder / LOG_FILE).open("ab") as errors:
        popen = spawn_group(argv, env=env, stdout=subprocess.PIPE, stderr=errors)
    return Launch(popen, folder)


def _write(request: BaseModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(request.model_dump_json(indent=1))


def command(folder: Path, num_processes: int) -> list[str]:
    """torchrun with a rendezvous of its own: fixed ports collide."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        "-m",
        "lookalike_trainers.run",
        str(folder),
    ]


def environment(device: str, num_processes: int = 1) -> dict[str, str]:
    """The worker's own environment, and what makes runs quick, quiet and repeatable."""
    threads = max(1, _cores() // num_processes)
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is repeatable only so
        "HF_HUB_OFFLINE": "1",  # a run never asks a hub
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**COMPUTE, **os.environ, **ours}


def _cores() -> int:
    """Cores this process may run on, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
