"""Real processes: who goes down with whom."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lookalike_platform.process import spawn_group, stop_group

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's"),
]

# A worker that starts a child as torchrun does its ranks: in a session of its own, which asks to
# die with its parent. Both tell their process ids.
RANK = """
import os, sys, time
from lookalike_platform.process import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
AGENT = f"""
import os, subprocess, sys, time
print(os.getpid(), flush=True)
subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)
time.sleep(600)
"""
WORKER = f"""
import sys, time
from lookalike_platform.process import spawn_group
spawn_group([sys.executable, "-c", {AGENT!r}])
time.sleep(600)
"""
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(*pids: int) -> None:
    while any(runs(pid) for pid in pids):
        time.sleep(0.02)


def read_pid(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def close(process: subprocess.Popen[bytes]) -> None:
    if process.stdout:
        process.stdout.close()


def test_killing_a_worker_takes_its_child_and_grandchild_along() -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
    agent, rank = read_pid(worker), read_pid(worker)
    assert runs(agent)
    assert runs(rank)
    worker.kill()
    worker.wait()
    wait_until_gone(agent, rank)
    close(worker)


def test_stopping_a_group_ends_descendants_in_other_sessions() -> None:
    group = spawn_group([sys.executable, "-c", AGENT], stdout=subprocess.PIPE)
    agent, rank = read_pid(group), read_pid(group)
    assert agent == group.pid
    stop_group(group, grace=30)
    assert not runs(agent)
    assert not runs(rank)
    assert group.returncode == -signal.SIGTERM
    close(group)


def test_what_does_not_end_on_request_is_killed_after_the_grace() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"
    group = spawn_group([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    stubborn = read_pid(group)
    stop_group(group, grace=0.2)
    assert not runs(stubborn)
    close(group)


def test_stopping_what_has_ended_does_nothing() -> None:
    group = spawn_group([sys.executable, "-c", "raise SystemExit(3)"])
    group.wait()
    stop_group(group, grace=30)
    assert group.returncode == 3


def test_a_child_outlives_the_thread_that_asked_for_it() -> None:
    started: list[subprocess.Popen[bytes]] = []
    echo = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
    thread = threading.Thread(
        target=lambda: started.append(
            spawn_group([sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    )
    thread.start()
    thread.join()
    (group,) = started
    assert group.stdin is not None
    assert group.stdout is not None
    group.stdin.write(b"still here\n")
    group.stdin.close()
    assert group.stdout.read() == b"still here\n"
    assert group.wait() == 0
    close(group)


def test_a_child_gets_its_environment_folder_and_arguments(tmp_path: Path) -> None:
    program = "import json, os, sys; print(json.dumps([os.environ['A'], os.getcwd(), sys.argv]))"
    group = spawn_group(
        [sys.executable, "-c", program, "x y"],
        env=os.environ | {"A": "b"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    output, _ = group.communicate()
    assert json.loads(output) == ["b", str(tmp_path), ["-c", "x y"]]


def test_a_program_that_is_not_there_is_named() -> None:
    group = spawn_group(["no-such-program"], stderr=subprocess.PIPE)
    _, errors = group.communicate()
    assert group.returncode == 1
    assert b"cannot run no-such-program: No such file or directory" in errors
