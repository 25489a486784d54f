"""The worker's side of sampling: keeps the resident process alive and talks to it. Torch-free."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lookalike_api.sampling.messages import SampleOrder
from lookalike_platform.errors import LookalikeError, of_problem
from lookalike_platform.process import COMPUTE, spawn_group

# What the process says; None when it says no more.
Answers = queue.Queue[dict[str, Any] | None]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing on a request's path asks a hub
    "TOKENIZERS_PARALLELISM": "false",
}
# A process that says nothing for this long is hung; a step of a large model takes seconds.
SILENCE_SECONDS = 600.0
# How often `should_stop` is asked while the process works.
LOOK_SECONDS = 0.25


@dataclass
class SamplerDied(Exception):
    """The resident process ended, or hung, in the middle of an order.

    begun: the order was in a batch, and may be why.
    """

    reason: str
    begun: bool = True

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Painted:
    """Files of the pictures, in order, and what the user should know about them."""

    images: list[Path]
    warnings: list[str]


@dataclass(eq=False)
class _Resident:
    """A resident process, and where the answers about each order go."""

    popen: "subprocess.Popen[bytes]"
    answers: dict[int, Answers] = field(default_factory=dict)
    heard_at: float = 0.0


@dataclass
class SamplerService:
    """One resident process, started when first needed and again after it died.

    Orders of several threads are carried out together.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    """What the process last said of itself; see metrics.py."""
    _resident: _Resident | None = None
    _number: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def sample(
        self,
        order: SampleOrder,
        on_progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Painted | None:
        """Carry out an order; None when `should_stop` said so before the pictures were ready.

        Raises:
            SamplerDied: the process is gone; the next order starts another.
            LookalikeError: the order cannot be carried out, and what to do about it.
        """
        with self._lock:
            resident = self._resident
            if resident is None or resident.popen.poll() is not None:
                resident = self._start()
            self._number += 1
            number = self._number
            answers = resident.answers[number] = queue.Queue()
        self._say(resident, {"op": "sample", "number": number, "order": order.to_json()})
        try:
            return self._follow(resident, number, answers, on_progress, should_stop)
        except BaseException:
            # Nobody wants these pictures any more.
            self._say(resident, {"op": "cancel", "number": number})
            raise
        finally:
            with self._lock:
                del resident.answers[number]

    def _follow(
        self,
        resident: _Resident,
        number: int,
        answers: Answers,
        on_progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Painted | None:
        started = time.monotonic()
        asked_to_stop = begun = False
        while True:
            if not asked_to_stop and should_stop():
                self._say(resident, {"op": "cancel", "number": number})
                asked_to_stop = True
            try:
                answer = answers.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                # While it works on other orders it is not hung.
                if time.monotonic() - max(started, resident.heard_at) > SILENCE_SECONDS:
                    resident.popen.kill()
                    silent = f"it said nothing for {SILENCE_SECONDS:.0f} s"
                    raise SamplerDied(silent, begun) from None
                continue
            if answer is None:
                raise SamplerDied(self._bury(resident), begun)
            match answer["type"]:
                case "begun":
                    begun = True
                case "progress":
                    on_progress(answer["step"], answer["total"])
                case "done":
                    return Painted([Path(p) for p in answer["images"]], answer["warnings"])
                case "canceled":
                    return None
                case "error":
                    raise of_problem(answer["problem"])
                case "crash":
                    raise LookalikeError(
                        f"The pictures could not be made ({answer['detail']}). The worker's log "
                        "has the whole story."
                    )

    def close(self) -> None:
        """End the process; harmless when there is none."""
        with self._lock:
            resident = self._resident
        if resident is not None:
            resident.popen.kill()
            self._bury(resident)

    @property
    def pid(self) -> int | None:
        """The resident process, if there is one."""
        resident = self._resident
        return resident.popen.pid if resident else None

    def _say(self, resident: _Resident, message: dict[str, Any]) -> None:
        # A process that is dead is noticed by the end of its answers.
        assert resident.popen.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):
            resident.popen.stdin.write(json.dumps(message).encode() + b"\n")
            resident.popen.stdin.flush()

    def _start(self) -> _Resident:
        """A process in place of the one there was."""
        if self._resident is not None:
            self._bury(self._resident)
        # A group of its own: an interrupt typed at the worker leaves the orders in hand alone.
        popen = spawn_group(
            [sys.executable, "-m", "lookalike_api.sampling.process"],
            env={**COMPUTE, **os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._resident = resident = _Resident(popen)
        threading.Thread(target=self._read, args=(resident,), daemon=True).start()
        return resident

    def _read(self, resident: _Resident) -> None:
        """Give each answer to the thread whose order it is about, and the end to all of them."""
        assert resident.popen.stdout is not None
        for line in resident.popen.stdout:
            resident.heard_at = time.monotonic()
            answer = json.loads(line)
            if answer["type"] == "alive":
                continue
            if answer["type"] == "metrics":
                self.figures = answer["figures"]
                continue
            with self._lock:
                answers = resident.answers.get(answer["number"])
            if answers is not None:  # else the order was given up
                answers.put(answer)
        resident.popen.stdout.close()
        with self._lock:
            # Orders from here on go to another process.
            if self._resident is resident:
                self._resident = None
                self.figures = {}  # what it held in memory went with it
            waiting = list(resident.answers.values())
        for answers in waiting:
            answers.put(None)
        self._bury(resident)

    def _bury(self, resident: _Resident) -> str:
        """Reap a dead process and say how it ended."""
        code = resident.popen.wait()
        with self._lock, contextlib.suppress(OSError):
            if self._resident is resident:
                self._resident = None
            assert resident.popen.stdin is not None
            resident.popen.stdin.close()
        return f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
