"""How a child process of a worker says what happens, in JSON lines on its standard output, and
hears that it is to stop.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lookalike_platform.errors import LookalikeError
from lookalike_platform.process import die_with_parent
from lookalike_trainers.launcher import STOP_FILE

Say = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """The worker asked for it."""


def carry_out(run: Callable[[Path, Say], None]) -> NoReturn:
    """A process that does one job: `run` the folder named on the command line, say how it ended."""
    die_with_parent()
    say = speaker()
    try:
        run(Path(sys.argv[1]), say)
    except Stopped:
        say({"type": "done", "outcome": "stopped"})
        leave(0)
    except LookalikeError as error:
        say({"type": "error", "problem": error.problem()})
        traceback.print_exc()
        leave(3)
    except Exception as error:
        say({"type": "crash", "detail": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        leave(1)
    say({"type": "done", "outcome": "complete"})
    leave(0)


def stop_if_asked(folder: Path) -> None:
    """Raises Stopped."""
    if (folder / STOP_FILE).exists():
        raise Stopped


def teller(folder: Path, say: Say) -> Callable[[int, int], None]:
    """Says how many steps of how many are done. Raises Stopped instead, if asked to stop."""

    def tell(done: int, total: int) -> None:
        stop_if_asked(folder)
        say({"type": "progress", "step": done, "total": total})

    return tell


def speaker(*, aloud: bool = True) -> Say:
    """A voice on the real standard output; libraries' prints go to standard error from now on."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        if aloud:
            lines.write(json.dumps(message) + "\n")
            lines.flush()

    return say


def leave(code: int) -> NoReturn:
    """End at once: taking down engines and process groups takes seconds and helps nobody."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
