"""A job's events to its end, though the stream may break off on the way."""

import time
from collections.abc import Iterator

import httpx

from lookalike_api.client.connection import Connection, Json

FINAL_STATES = frozenset({"succeeded", "failed", "canceled"})


def follow(connection: Connection, job_id: str, after: int, patience: float) -> Iterator[Json]:
    """See `Client.events`. patience: seconds to go on looking for an API that went away."""
    last, lost_since = after, None
    while True:
        try:
            for event in connection.stream(f"/v1/jobs/{job_id}/events", last):
                lost_since = None
                last = event.get("seq", last)
                yield event
                if event["type"] == "state" and event["payload"]["state"] in FINAL_STATES:
                    return
            # An orderly end: the job is finished, or the server is going away.
            if connection.ask("GET", f"/v1/jobs/{job_id}").json()["state"] in FINAL_STATES:
                return
        except httpx.TransportError as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > patience:
                raise connection.unreachable(error) from error
        time.sleep(0.5)
