"""The embedded stack: everything Lookalike needs, as children of one process.

    the supervisor ─┬─ api      uvicorn
                    ├─ train    Celery worker of the queues `train`, `evaluate` and `compose`
                    └─ sample   Celery worker of the queue `sample`

A home has at most one stack. Its supervisor holds a lock on `<home>/stack.lock`, which the kernel
lets go of however the supervisor ends, and the kernel ends its children then: nothing that a crash
leaves behind has to be cleaned up, or can mislead the next start.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from lookalike_platform.db.engine import migrate
from lookalike_platform.errors import Conflict, LookalikeError
from lookalike_platform.process import spawn_group, stop_group
from lookalike_platform.settings import Settings

log = logging.getLogger(__name__)

START_SECONDS = 60.0
CALM_SECONDS = 60.0  # a part that ran this long starts again at once when it dies
MAX_LOG_BYTES = 10 * 2**20
LONGEST_DELAY = 30.0


def find_stack(settings: Settings) -> str | None:
    """The URL of the stack that runs on this home, or None."""
    try:
        with _lock_path(settings).open("r+") as lock:
            if _try_lock(lock):
                return None
            said = lock.read()
    except FileNotFoundError:
        return None
    # Locked and empty: a stack between taking the lock and knowing its URL.
    return json.loads(said)["url"] if said else None


@dataclass
class Part:
    """One child process, and what is needed to start it again."""

    name: str
    argv: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    start_at: float = 0.0


@dataclass
class Stack:
    """The running stack of one home; made by `run_stack`."""

    settings: Settings
    on_message: Callable[[str], object]
    parts: list[Part] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _tender: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://{self.settings.api_host}:{self.settings.api_port}"

    def start(self) -> Self:
        """Start the parts and wait until the API is ready.

        Raises:
            LookalikeError: it did not become ready; the last lines of its log say why.
        """
        migrate(self.settings.database_url)
        self.parts = _parts(self.settings)
        for part in self.parts:
            self._spawn(part)
        self._await_api()
        self._tender = threading.Thread(target=self._tend, name="stack", daemon=True)
        self._tender.start()
        return self

    def stop(self) -> None:
        """Stop all parts at the same time; a job in training goes back to the queue."""
        self._stopping.set()
        if self._tender:
            self._tender.join()
        running = [part.process for part in self.parts if part.process]
        with ThreadPoolExecutor(max_workers=max(1, len(running))) as pool:
            for process in running:
                pool.submit(_stop, process, self.settings.stop_grace_seconds)

    def states(self) -> dict[str, str]:
        """Part → `running` or `starting again`."""
        return {p.name: "running" if _runs(p) else "starting again" for p in self.parts}

    def _spawn(self, part: Part) -> None:
        part.log.parent.mkdir(parents=True, exist_ok=True)
        if part.log.exists() and part.log.stat().st_size > MAX_LOG_BYTES:
            part.log.replace(part.log.with_suffix(".log.1"))
        part.started = time.monotonic()
        with part.log.open("ab") as output:
            part.process = spawn_group(
                part.argv, env=environment(self.settings), stdout=output, stderr=output
            )

    def _await_api(self) -> None:
        api = self.parts[0]
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{self.url}/readyz"):
            if not _runs(api) or time.monotonic() > deadline:
                how = "did not become ready" if _runs(api) else "ended at its start"
                raise LookalikeError(f"The API {how}. {api.log} ends with:\n{_tail(api.log)}")
            time.sleep(0.05)

    def _tend(self) -> None:
        """Start parts that died again, at once the first time and then ever more slowly."""
        while not self._stopping.wait(0.5):
            now = time.monotonic()
            for part in self.parts:
                if _runs(part):
                    continue
                if part.process:
                    code = part.process.returncode
                    part.process = None
                    part.deaths = 1 if now - part.started > CALM_SECONDS else part.deaths + 1
                    delay = min(2.0 ** (part.deaths - 1) - 1, LONGEST_DELAY)
                    part.start_at = now + delay
                    when = "now" if not delay else f"in {delay:.0f} s"
                    self.on_message(
                        f"{part.name} ended with code {code} and starts again {when}; "
                        f"its log is {part.log}"
                    )
                elif now >= part.start_at:
                    self._spawn(part)


@contextmanager
def run_stack(
    settings: Settings, on_message: Callable[[str], object] = log.warning
) -> Iterator[Stack]:
    """Run the stack of `settings.home` during the block, and stop it at the end.

    Raises:
        Conflict: a stack runs on this home already, or the port is taken.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with _lock_path(settings).open("a+") as lock:
        if not _try_lock(lock):
            where = find_stack(settings) or "a URL it has yet to tell"
            raise Conflict(f"The stack of {settings.home} runs already, at {where}.")
        lock.truncate(0)
        _check_port(settings)
        stack = Stack(settings, on_message)
        try:
            stack.start()
            lock.write(json.dumps({"url": stack.url, "pid": os.getpid()}))
            lock.flush()
            yield stack
        finally:
            stack.stop()
            lock.truncate(0)


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with which a child reads the same settings."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {**os.environ, **{f"LOOKALIKE_{key.upper()}": str(v) for key, v in values.items()}}


def _parts(settings: Settings) -> list[Part]:
    program = [sys.executable, "-m", "lookalike_api.cli.main"]
    commands = {
        "api": ["api"],
        "train": ["worker", "--queue", "train"],
        "sample": ["worker", "--queue", "sample"],
    }
    logs = settings.home / "logs"
    return [Part(name, [*program, *argv], logs / f"{name}.log") for name, argv in commands.items()]


def _lock_path(settings: Settings) -> Path:
    return settings.home / "stack.lock"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_port(settings: Settings) -> None:
    host, port = settings.api_host, settings.api_port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"Cannot listen on {host}:{port} ({error.strerror}). Choose another port: "
                f"`lookalike up --port {port + 1}`, or LOOKALIKE_API_PORT."
            ) from error


def _answers(url: str) -> bool:
    try:
        # No proxy of the environment stands between us and our own child.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5):
            return True
    except OSError:
        return False


def _runs(part: Part) -> bool:
    return part.process is not None and part.process.poll() is None


def _stop(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """Ask a part alone to stop: it knows best how to end its children. Then end what is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    stop_group(process, grace=1)


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
