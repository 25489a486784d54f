"""What every stage shares: atomic checkpoints, a clean stop, the learning rate's shape, devices."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lookalike_platform.device import device_of
from lookalike_platform.errors import Conflict


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary name beside ``path``, fsync it, rename it over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that a kill at any moment leaves the old checkpoint or the new one."""
    save_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state last saved at ``path``, on the CPU, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_unfinished(path: Path, steps: int) -> dict[str, Any] | None:
    """The state to go on from, or None at the start.

    Raises ``Conflict`` where ``steps`` steps are done: nothing would be trained.
    """
    state = load_checkpoint(path)
    if state is not None and state["step"] >= steps:
        raise Conflict(
            f"{path} is at step {state['step']} already: give more --steps to go on, or another "
            "--run to begin anew"
        )
    return state


class StopSignal:
    """True once SIGTERM or SIGINT came: the loop then saves a checkpoint and leaves."""

    def __init__(self) -> None:
        self._stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True

    def __bool__(self) -> bool:
        return self._stopped


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float = 0.35) -> float:
    """Warm-up, a plateau, then a straight fall to zero over the last ``decay`` of ``steps``.

    Unlike a cosine, the plateau does not depend on ``steps``: a run can be resumed with another
    end as long as the fall has not begun (Hu et al. 2024, MiniCPM, section 4).
    """
    up = min(1.0, (step + 1) / warmup)
    down = min(1.0, (steps - step) / (decay * steps))
    return peak * up * max(down, 0.0)


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return device_of("auto")


def autocast() -> torch.autocast:
    """bf16 on a GPU, and on a CPU with the instructions for it; float32 on others.

    oneDNN emulates bf16 on CPUs without AVX-512, a convolution a hundred times as slowly.
    """
    where = device().type
    fast = where == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(where, torch.bfloat16, enabled=fast)


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator that depends on ``seeds`` alone, so a resumed step draws what it would have.

    The seeds are mixed as digits of base 1,000,003.
    """
    seed = 0
    for value in seeds:
        seed = seed * 1_000_003 + value
    return torch.Generator().manual_seed(seed % 2**63)
