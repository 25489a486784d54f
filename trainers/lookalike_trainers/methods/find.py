"""From a method's name in catalog.METHODS to its code. Torch."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.compose.rules import COMPOSITION
from lookalike_registry.safetensors_header import Header
from lookalike_registry.tensor_file import METHOD_KEY
from lookalike_trainers.catalog import (
    COMPOSITION_ACTS_ON_ROWS,
    COMPOSITION_ROWS,
    COMPOSITION_WEAR,
    METHODS,
    MethodInfo,
)
from lookalike_trainers.methods.method import Builder, Wear
from lookalike_trainers.methods.row_adapter import Rows

Prepare = Callable[[Path, Path | None, Path], None]
"""Called with the base's folder, the folder of caches and the adapter's file."""


def builder_of(method: str) -> Builder:
    """What builds the method on a base. Raises InvalidRequest if there is none of this name."""
    builder: Builder = _load(_info(method).entry)
    return builder


def wear_of(method: str) -> Wear:
    """What lets its adapters act. Raises InvalidRequest if there is none of this name."""
    wear: Wear = _load(COMPOSITION_WEAR if method == COMPOSITION else _info(method).wear)
    return wear


def prepare_of(method: str) -> Prepare | None:
    """What puts into the folder of caches what wearing its adapters would take long to compute of
    their base; None if there is nothing."""
    entry = None if method == COMPOSITION else _info(method).prepare
    return _load(entry) if entry else None


def rows_of(method: str) -> Rows:
    """What lets its adapters act on single rows, those of which `acts_on_rows` says that they can.

    Raises InvalidRequest if none do.
    """
    entry = COMPOSITION_ROWS if method == COMPOSITION else _info(method).rows
    if entry is None:
        raise InvalidRequest(f"Adapters of {method} change the base as a whole.")
    rows: Rows = _load(entry)
    return rows


def acts_on_rows(header: Header) -> bool:
    """Whether a file, by its header, can act on single rows; else it must be worn as a whole.

    Raises InvalidRequest if there is no such method.
    """
    method = header.metadata.get(METHOD_KEY, "lora")
    if method == COMPOSITION:
        entry: str | None = COMPOSITION_ACTS_ON_ROWS
    else:
        info = _info(method)
        if info.rows is None:
            return False
        entry = info.acts_on_rows
    return entry is None or bool(_load(entry)(header))


def _info(method: str) -> MethodInfo:
    for info in METHODS:
        if info.name == method:
            return info
    known = ", ".join(info.name for info in METHODS)
    raise InvalidRequest(f"This version knows no method {method!r}; it has {known}.")


def _load(entry: str) -> Any:
    module_name, function = entry.split(":")
    return getattr(import_module(module_name), function)
