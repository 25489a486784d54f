"""Child processes that never outlive us: own group, killed with this process, stopped for good.

worker ── spawn_group ──→ torchrun (own session) ──→ ranks (each its own session)
   the worker is killed   → the kernel kills torchrun, and each rank through die_with_parent
   stop_group             → TERM to all of them, grace, KILL to those left
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from lookalike_platform import guard
from lookalike_platform.guard import die_with_parent

__all__ = ["COMPUTE", "die_with_parent", "spawn_group", "stop_group"]

log = logging.getLogger(__name__)

Stream = IO[bytes] | int | None
Process = tuple[int, int]  # process id and start time, which together never come back

# The environment of children that compute; an operator's own values go first. Threads that wait for
# each other spin for microseconds, then sleep: never spinning makes a step take half as long again,
# spinning for as long as OpenMP does by default makes it take ten times as long as soon as another
# program wants one of the cores. And glibc gives the kernel back what is free, to get it anew, page
# by page, in the next layer: told to keep it, a denoiser's call takes a tenth less time. (It takes
# no larger threshold than 32 MiB for what it maps on its own.)
COMPUTE = {
    "GOMP_SPINCOUNT": "3000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
}

# The kernel's death signal follows the *thread* that forked, so all children are started from one
# thread that lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn_group(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
) -> subprocess.Popen[bytes]:
    """Start a program as the leader of its own session, killed by the kernel when we die.

    Safe to call from any thread. Elsewhere than on Linux the program is started with a warning
    that it may outlive us.
    """
    command = list(argv)
    if sys.platform == "linux":
        interpreter = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())]
        command = [*interpreter, *command]
    else:
        log.warning("only Linux kills children with their parent: %s may outlive us", command[0])
    started = _spawner.submit(
        subprocess.Popen,
        command,
        env=None if env is None else dict(env),
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    return started.result()


def stop_group(popen: subprocess.Popen[bytes], grace: float) -> None:
    """End the process, its group and all its descendants: TERM, up to `grace` seconds, KILL.

    Descendants in sessions of their own are found before anything is signalled: orphans could not
    be told from other processes afterwards. Returns when none of them runs any more.
    """
    family = _descendants(popen.pid)
    _signal(popen.pid, family, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        family |= _descendants(popen.pid)
        if popen.poll() is not None and not _alive(family):
            break
        time.sleep(0.05)
    _signal(popen.pid, family | _descendants(popen.pid), signal.SIGKILL)
    popen.wait()
    while _alive(family):
        time.sleep(0.01)


def _signal(group: int, family: set[Process], number: signal.Signals) -> None:
    """Signal every process of the group, and those of the family outside it, once."""
    outside = {pid for pid, _ in _alive(family) if _group_of(pid) != group}
    # Nobody left in it; macOS says so by PermissionError.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for pid in outside:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _alive(processes: set[Process]) -> set[Process]:
    """Those that still run: a zombie does not."""
    return processes & _table().keys()


def _descendants(root: int) -> set[Process]:
    """Children of `root`, and theirs, except itself. Empty where there is no /proc."""
    parents = _table()
    found: set[Process] = set()
    members = {root}
    while True:
        children = {process for process, parent in parents.items() if parent in members} - found
        if not children:
            return found
        found |= children
        members = {pid for pid, _ in children}


def _table() -> dict[Process, int]:
    """Every running process and its parent's id, from /proc (proc(5): fields 3, 4 and 22)."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        state, parent, start = fields[0], int(fields[1]), int(fields[19])
        if state not in (b"Z", b"X"):
            table[int(stat.parent.name), start] = parent
    return table
