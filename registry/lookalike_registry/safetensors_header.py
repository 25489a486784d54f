"""The header of a safetensors file, read and written without torch or the safetensors library.

Layout: eight bytes (the header's length N, little-endian), N bytes of JSON, then the tensors.

    {"__metadata__": {text: text}, "name": {"dtype": "F32", "shape": [4, 2],
                                            "data_offsets": [begin, end]}, …}
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookalike_platform.errors import InvalidRequest

MAX_HEADER_BYTES = 16 * 2**20
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
# Every pickle of protocol 2 or later starts with the first; torch.save's archives with the second.
PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Tensor:
    """One tensor as the header tells of it; `begin` and `end` count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Names, shapes and places of all tensors, and the file's free-text metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a safetensors header; the tensors must fill the file without gaps.

    Raises:
        InvalidRequest: the file is a pickle, or not a whole and sound safetensors file.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InvalidRequest(f"{path.name} is a pickle by its name: only safetensors are read.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        sound = 2 <= length <= min(MAX_HEADER_BYTES, size - 8)
        if not sound and start.startswith(PICKLE_STARTS):
            raise InvalidRequest(f"{path.name} is a pickle: only safetensors are read.")
        if not sound:
            raise InvalidRequest(f"{path.name} is not a safetensors file: its header has no size.")
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_no_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be text")
        tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
        _check_filled(tensors, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} has an unsound safetensors header: {error}") from error
    return Header(tensors, metadata)


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """The safetensors file `data` with this metadata, keys sorted.

    The safetensors library writes metadata in a random order, so the same tensors would give
    another digest each time.
    """
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = metadata
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start aligned
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _tensor(entry: dict[str, Any], data_start: int) -> Tensor:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets must be whole numbers")
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    if end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise ValueError("a tensor's size does not fit its shape")
    return Tensor(entry["dtype"], shape, data_start + begin, data_start + end)


def _check_filled(tensors: dict[str, Tensor], start: int, size: int) -> None:
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise ValueError("tensors overlap or leave gaps")
        position = tensor.end
    if position != size:
        raise ValueError("the file is truncated or has bytes after the last tensor")
