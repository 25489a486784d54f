"""What is said of orders that end without pictures. Imports torch."""

import traceback
from typing import Any

import torch

from lookalike_platform.errors import LookalikeError, TooLate
from lookalike_platform.jobs.reaper import LATE

CANCELED = {"type": "canceled"}
TOO_LATE = {"type": "error", "problem": TooLate(LATE).problem()}


def told(error: BaseException) -> dict[str, Any]:
    """What is said of an order that ends with this error.

    Raises what leaves a GPU unusable to the process: a new one is to take its place.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, LookalikeError):
        return {"type": "error", "problem": error.problem()}
    traceback.print_exception(error)
    return {"type": "crash", "detail": f"{type(error).__name__}: {error}"}
