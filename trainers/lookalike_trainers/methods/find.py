"""From a method's name in catalog.METHODS to its code. Torch."""

from importlib import import_module
from typing import Any

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.compose.rules import COMPOSITION
from lookalike_trainers.catalog import (
    COMPOSITION_ROWS,
    COMPOSITION_WEAR,
    METHODS,
    MethodInfo,
)
from lookalike_trainers.methods.method import Builder, Wear
from lookalike_trainers.methods.row_adapter import Rows


def builder_of(method: str) -> Builder:
    """What builds the method on a base. Raises InvalidRequest if there is none of this name."""
    builder: Builder = _load(_info(method).entry)
    return builder


def wear_of(method: str) -> Wear:
    """What lets its adapters act. Raises InvalidRequest if there is none of this name."""
    wear: Wear = _load(COMPOSITION_WEAR if method == COMPOSITION else _info(method).wear)
    return wear


def rows_of(method: str) -> Rows | None:
    """What lets its adapters act on single rows; None if they must be worn as a whole."""
    entry = COMPOSITION_ROWS if method == COMPOSITION else _info(method).rows
    return _load(entry) if entry else None


def _info(method: str) -> MethodInfo:
    for info in METHODS:
        if info.name == method:
            return info
    known = ", ".join(info.name for info in METHODS)
    raise InvalidRequest(f"This version knows no method {method!r}; it has {known}.")


def _load(entry: str) -> Any:
    module_name, function = entry.split(":")
    return getattr(import_module(module_name), function)
