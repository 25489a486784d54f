"""The resident sampling process: `python -m lookalike_api.sampling.process`. Imports torch.

It reads orders from standard input and answers on standard output (see `messages.py`). A thread
reads, so that orders join and cancels are seen between two steps; the main thread does the steps.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from lookalike_api.sampling.messages import SampleOrder
from lookalike_api.sampling.metrics import Pace, figures
from lookalike_platform.settings import get_settings

BEAT_SECONDS = 20.0

Inbox = queue.SimpleQueue[dict[str, Any] | None]
"""Messages of the service; None only wakes whoever waits for one."""


def main() -> None:
    answers = _private_standard_output()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    from lookalike_api.sampling.batch_size import batch_pixels
    from lookalike_api.sampling.engine import Engine
    from lookalike_api.sampling.loading import Adapters
    from lookalike_api.sampling.models import ResidentBases

    settings = get_settings()
    adapters = Adapters(settings.adapter_host_bytes, settings.adapter_device_bytes)
    speak = _speaker(answers)
    pace = Pace()

    def say(number: int, answer: dict[str, Any]) -> None:
        if pace.due(answer):
            told = figures(adapters, engine.active)
            speak({"number": number, "type": "metrics", "figures": told})
        speak({"number": number, **answer})

    bases = ResidentBases(settings.cache)
    pixels = settings.batch_pixels or batch_pixels(settings.device)
    engine = Engine(bases, adapters, say, lambda: inbox.put(None), pixels)
    busy = False
    while True:
        for message in _taken(inbox, wait=not busy):
            if message["op"] == "sample":
                engine.accept(message["number"], SampleOrder.from_json(message["order"]))
            else:
                engine.cancel(message["number"])
        busy = engine.turn()
        if not busy and adapters.preparing:
            speak({"type": "alive"})


def _taken(inbox: Inbox, wait: bool) -> list[dict[str, Any]]:
    """What has come in; with `wait` the first thing, if only to wake us, or nothing for a while."""
    taken: list[dict[str, Any] | None] = []
    with contextlib.suppress(queue.Empty):
        if wait:
            taken.append(inbox.get(timeout=BEAT_SECONDS))
        while True:
            taken.append(inbox.get_nowait())
    return [message for message in taken if message is not None]


def _listen(inbox: Inbox) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    # The service is gone: nobody wants the pictures.
    os._exit(0)


def _speaker(answers: TextIO) -> Callable[[dict[str, Any]], None]:
    """Says one thing at a time, whichever threads speak."""
    lock = threading.Lock()

    def speak(answer: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    return speak


def _private_standard_output() -> TextIO:
    """The real standard output; what libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def run() -> None:
    """Ends the process at once where `main` fails: a usual end would wait for what other threads
    compute, and all orders for that."""
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    run()
