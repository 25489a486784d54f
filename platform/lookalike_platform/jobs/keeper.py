"""The keeper: a thread that runs the relay and the reaper beside the API."""

import logging
import threading
import time

from lookalike_platform.db.engine import Database
from lookalike_platform.jobs.reaper import reap
from lookalike_platform.jobs.relay import Send, publish_pending
from lookalike_platform.settings import Settings

log = logging.getLogger(__name__)


class Keeper:
    """Runs the relay and the reaper every `settings.reap_seconds`, and the relay when woken.

    A broker or database that is away is logged and tried again at the next round.
    """

    def __init__(self, db: Database, send: Send, settings: Settings) -> None:
        self._db, self._send, self._settings = db, send, settings
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Send what is owed now: called after a submit."""
        self._wake.set()

    def stop(self) -> None:
        """End after the round in progress."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        next_reap = 0.0
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                if time.monotonic() >= next_reap:
                    next_reap = time.monotonic() + self._settings.reap_seconds
                    reap(self._db, time.time(), self._settings.max_attempts)
                publish_pending(self._db, self._send)
            except Exception:
                log.warning("the keeper's round failed; it will try again", exc_info=True)
            self._wake.wait(max(0.0, next_reap - time.monotonic()))
