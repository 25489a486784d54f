"""A direct connection from the API to a sampling worker, for less waiting. Torch-free.

    POST /tickets    there is a generation to make            202
    GET  /metrics    the sampler's figures, for Prometheus    200

The ticket stands for the broker's message, which comes all the same: the job's row says what is to
be done, and its lease by whom, so that a lost call, or one too many, changes nothing. Whoever can
reach the address can do no more than wake the worker: let it listen inside the installation only.
"""

import errno
import http.client
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from lookalike_platform.errors import Conflict

log = logging.getLogger(__name__)

CALL_SECONDS = 1.0


def call(url: str) -> None:
    """Tell the worker at `url` that there is a generation; one that does not answer is let be."""
    # No proxy of the environment stands between two parts of one installation.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/tickets", data=b"", method="POST")
        with opener.open(request, timeout=CALL_SECONDS):
            pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        log.warning("the sampler at %s does not answer (%s): the broker will tell it", url, error)


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
