"""What a worker process has once, for all its jobs: a name and its database."""

import os
import socket
from functools import cache

from lookalike_platform.db.engine import Database, open_database


def worker_name() -> str:
    """As leases and attempts know it."""
    return f"{socket.gethostname()}:{os.getpid()}"


@cache
def worker_database(url: str) -> Database:
    return open_database(url)
