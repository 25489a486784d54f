"""The states of a job.

    train      queued → preparing → training → evaluating → registering ─┬→ succeeded
    generate   queued → preparing → sampling ────────────────────────────┼→ failed
    evaluate   queued → preparing → evaluating ──────────────────────────┤
    compose    queued → preparing → composing → registering ─────────────┴→ canceled
                 ↑__________|  worker lost, or drained

A worker moves its job forwards only, and may skip states. A job goes back to `queued` when its
worker is lost or drained. Terminal states absorb: nothing leaves them.
"""

QUEUED = "queued"
PREPARING = "preparing"
SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELED = "canceled"

TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELED})

RUNNING_STATES = {
    "train": (PREPARING, "training", "evaluating", "registering"),
    "generate": (PREPARING, "sampling"),
    "evaluate": (PREPARING, "evaluating"),
    "compose": (PREPARING, "composing", "registering"),
}
"""By kind of job, the states a worker takes it through."""

QUEUES = {"train": "train", "generate": "sample", "evaluate": "evaluate", "compose": "compose"}
"""By kind of job, the queue its message goes to."""

ALL = tuple(
    dict.fromkeys([QUEUED, *(s for run in RUNNING_STATES.values() for s in run), *sorted(TERMINAL)])
)


def is_forward(kind: str, current: str, following: str) -> bool:
    """Whether a worker may take a job of `kind` from `current` on to `following`."""
    states = RUNNING_STATES[kind]
    return (
        current in states
        and following in states
        and states.index(following) > states.index(current)
    )
