"""A program that runs another, which then dies with the process that asked for it (Linux).

`python guard.py PARENT_PID PROGRAM ARGUMENT…`. It stands between fork and exec where Popen's
`preexec_fn` would, which must not be used in a process with threads. Standard library only: it is
run by path, without site-packages, to start fast.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends; survives exec.

    `parent`: the process expected as parent; if it is gone already, this process ends at once.
    Does nothing where there is no such service (other systems than Linux).
    """
    if sys.platform != "linux":
        return
    before = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != before:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parent, *argv = sys.argv[1:]
    die_with_parent(int(parent))
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.exit(f"cannot run {argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
