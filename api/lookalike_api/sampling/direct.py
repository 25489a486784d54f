"""A direct connection from the API to a sampling worker, for less waiting. Torch-free.

    POST /tickets    there is a generation to make            202
    GET  /metrics    the sampler's figures, for Prometheus    200

The ticket stands for the broker's message, which comes all the same: the job's row says what is to
be done, and its lease by whom, so that a lost call, or one too many, changes nothing. Whoever can
reach the address can do no more than wake the worker: let it listen inside the installation only.
"""

import contextlib
import errno
import logging
import queue
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from lookalike_platform.errors import Conflict

log = logging.getLogger(__name__)

CALL_SECONDS = 1.0


class Caller:
    """Tells the worker at `url` of generations, from a thread of its own, one after another."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="caller", daemon=True).start()

    def call(self) -> None:
        """There is one more generation. Returns at once."""
        self._due.put(True)

    def close(self) -> None:
        self._due.put(False)

    def _run(self) -> None:
        while self._due.get():
            if not call(self._url):
                # Those that came meanwhile would only wait for the same; the broker tells of all.
                with contextlib.suppress(queue.Empty):
                    while self._due.get_nowait():
                        pass
                    return


def call(url: str) -> bool:
    """Tell the worker at `url` that there is a generation; whether it answers."""
    # No proxy of the environment stands between two parts of one installation.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/tickets", data=b"", method="POST")
        with opener.open(request, timeout=CALL_SECONDS):
            return True
    except Exception as error:  # whatever it is, the caller's thread lives on
        log.warning("the sampler at %s does not answer (%s): the broker will tell it", url, error)
        return False


def listen(url: str, serve: Callable[[], None], metrics: Callable[[], str]) -> ThreadingHTTPServer:
    """Answer calls at `url` in threads, each ticket in one of its own; `shutdown` ends it.

    Raises Conflict if it cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/tickets":
                self.send_error(404)
                return
            threading.Thread(target=serve, name="ticket", daemon=True).start()
            self._answer(202, "")

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            self._answer(200, metrics())

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    where = urlsplit(url)
    try:
        server = ThreadingHTTPServer((where.hostname or "127.0.0.1", where.port or 80), Handler)
    except OSError as error:
        remedy = "LOOKALIKE_SAMPLER_URL names an address of this machine"
        if error.errno == errno.EADDRINUSE:
            remedy = (
                "of several sampling workers one can listen there: start the others without "
                "LOOKALIKE_SAMPLER_URL, or with addresses of their own"
            )
        raise Conflict(f"Cannot listen at {url} ({error.strerror}); {remedy}.") from error
    threading.Thread(target=server.serve_forever, name="direct", daemon=True).start()
    return server
