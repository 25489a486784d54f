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
from lookalike_platform.errors import InvalidRequest, LookalikeError
from lookalike_platform.process import spawn_group

# What the process says; None when it says no more.
Answers = queue.Queue[dict[str, Any] | None]

# Threads that wait for each other spin for microseconds, then sleep: to spin long slows steps down
# tenfold as soon as another program wants one of the cores, never to spin makes them half as slow
# again. An operator's own value goes first.
SPIN_COUNT = "3000"
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
    """The resident process ended, or hung, in the middle of an order."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Painted:
    """Files of the pictures, in order, and what the user should know about them."""

    images: list[Path]
    warnings: list[str]


@dataclass
class SamplerService:
    """One resident process, started when first needed and again after it died.

    Not for use from several threads at once: a worker has one job at a time.
    """

    _process: subprocess.Popen[bytes] | None = None
    _number: int = 0
    _answers: Answers = field(default_factory=queue.Queue)

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
        if self._process is not None and self._process.poll() is not None:
            self._bury()  # it died between two orders
        if self._process is None:
            self._start()
        self._number += 1
        number = self._number
        self._say({"op": "sample", "number": number, "order": order.to_json()})
        try:
            return self._follow(number, on_progress, should_stop)
        except BaseException:
            # Whoever comes next must not wait for pictures that nobody wants any more.
            self._say({"op": "cancel", "number": number})
            raise

    def _follow(
        self,
        number: int,
        on_progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> Painted | None:
        heard_at = time.monotonic()
        asked_to_stop = False
        while True:
            if not asked_to_stop and should_stop():
                self._say({"op": "cancel", "number": number})
                asked_to_stop = True
            try:
                answer = self._answers.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if time.monotonic() - heard_at > SILENCE_SECONDS:
                    self.close()
                    raise SamplerDied(f"it said nothing for {SILENCE_SECONDS:.0f} s") from None
                continue
            heard_at = time.monotonic()
            if answer is None:
                raise SamplerDied(self._bury())
            if answer["number"] != number:
                continue  # of an order that was given up
            match answer["type"]:
                case "progress":
                    on_progress(answer["step"], answer["total"])
                case "done":
                    return Painted([Path(p) for p in answer["images"]], answer["warnings"])
                case "canceled":
                    return None
                case "error":
                    raise InvalidRequest(answer["problem"]["detail"])
                case "crash":
                    raise LookalikeError(
                        f"The pictures could not be made ({answer['detail']}). The worker's log "
                        "has the whole story."
                    )

    def close(self) -> None:
        """End the process; harmless when there is none."""
        if self._process is not None:
            self._process.kill()
            self._bury()

    @property
    def pid(self) -> int | None:
        """The resident process, if there is one."""
        return self._process.pid if self._process else None

    def _say(self, message: dict[str, Any]) -> None:
        # A process that is dead is noticed by the end of its answers.
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()

    def _start(self) -> None:
        # A group of its own: an interrupt typed at the worker leaves the order in hand alone.
        self._process = spawn_group(
            [sys.executable, "-m", "lookalike_api.sampling.process"],
            env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answers = queue.Queue()
        reader = threading.Thread(target=_read, args=(self._process, self._answers), daemon=True)
        reader.start()

    def _bury(self) -> str:
        """Reap the dead process and say how it ended."""
        assert self._process is not None
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process = None
        return f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"


def _read(process: subprocess.Popen[bytes], answers: "queue.Queue[dict[str, Any] | None]") -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed while reading
        for line in process.stdout:
            answers.put(json.loads(line))
    answers.put(None)
