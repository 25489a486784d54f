"""From a method's name in catalog.METHODS to its code. Torch."""

from importlib import import_module
from typing import Any

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.catalog import METHODS, MethodInfo
from lookalike_trainers.methods.method import Builder, Wear


def builder_of(method: str) -> Builder:
    """What builds the method on a base. Raises InvalidRequest if there is none of this name."""
    builder: Builder = _load(_info(method).entry)
    return builder


def wear_of(method: str) -> Wear:
    """What lets its adapters act. Raises InvalidRequest if there is none of this name."""
    wear: Wear = _load(_info(method).wear)
    return wear


def _info(method: str) -> MethodInfo:
    for info in METHODS:
        if info.name == method:
            return info
    known = ", ".join(info.name for info in METHODS)
    raise InvalidRequest(f"This version knows no method {method!r}; it has {known}.")


def _load(entry: str) -> Any:
    module_name, function = entry.split(":")
    return getattr(import_module(module_name), function)
