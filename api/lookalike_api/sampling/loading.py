"""Adapter files brought into memory, checked before they act. Imports torch.

What is not exactly what was registered for this base is refused by name: nobody gets the base
alone in its place.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lookalike_api.sampling.cache import Cache, Kept
from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.check import check_registered
from lookalike_registry.safetensors_header import ITEM_BYTES, read_header
from lookalike_registry.tensor_file import METHOD_KEY
from lookalike_trainers.methods import find
from lookalike_trainers.methods.row_adapter import RowAdapter

AROUND_A_TENSOR = 1280  # bytes that Python, torch and the allocator keep beside its numbers

Key = tuple[str, str]
"""An adapter for a base: its digest and the base's fingerprint. In memory once, whatever it is
called, and whether or not the base has been loaded anew."""


@dataclass(frozen=True)
class Wanted:
    """Where an adapter comes from: its file, and the ResidentBase that is to wear it."""

    file: AdapterFile
    base: Any


class Adapters:
    """The adapters that act on single rows, those used last: on the host, and on its device."""

    def __init__(self, host_bytes: int, device_bytes: int) -> None:
        loaders = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        # One at a time, so that what is copied always finds room on the host.
        copier = ThreadPoolExecutor(1, thread_name_prefix="copier")
        # One at a time, so that who asks for the same file meanwhile finds it looked through.
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="checker")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="preparer")
        self._prepared: set[Key] = set()
        self._preparing: set[Future[None]] = set()
        self.host: Cache[Key, Wanted, RowAdapter] = Cache(
            "host's adapter cache", host_bytes, _bytes, _load, loaders
        )
        self.device: Cache[Key, Wanted, RowAdapter] = Cache(
            "device's adapter cache", device_bytes, _bytes, self._copy, copier
        )

    def of(self, base: Any) -> Cache[Key, Wanted, RowAdapter]:
        """Where a base's adapters are taken from."""
        return self.host if base.device.type == "cpu" else self.device

    def check(self, base: Any, files: Sequence[AdapterFile]) -> None:
        """Raises InvalidRequest for adapters that are too large to be in memory together."""
        sources = {key_of(file, base): Wanted(file, base) for file in files}
        for cache in {id(self.host): self.host, id(self.of(base)): self.of(base)}.values():
            cache.check(sources)

    def take(
        self, base: Any, files: Sequence[AdapterFile], *, only_there: bool = False
    ) -> list[Kept[RowAdapter]] | None:
        """All of them pinned, or None for as long as there is no room; see cache.py."""
        wanted = [(key_of(file, base), Wanted(file, base)) for file in files]
        return self.of(base).take(wanted, only_there=only_there)

    def look_through(self, base: Any, file: AdapterFile, method: str) -> list[Future[None]]:
        """Check, beside other work, a file that the whole base is to wear (see `check`), and put
        what takes long to compute of the base for it into the cache."""
        checked = self._checker.submit(check, file, base.folder)
        prepare = find.prepare_of(method)
        key = key_of(file, base)
        if prepare is None or key in self._prepared:
            return [checked]
        # The base itself is not held: it may have to go before this is done.
        prepared = self._preparer.submit(prepare, base.folder, base.cache, file.path)
        self._preparing.add(prepared)
        prepared.add_done_callback(lambda done: self._note(key, done))
        return [checked, prepared]

    @property
    def preparing(self) -> bool:
        """Whether something is computed of a base that may take very long."""
        return bool(self._preparing)

    def _note(self, key: Key, prepared: Future[None]) -> None:
        self._preparing.discard(prepared)
        if not prepared.cancelled() and prepared.exception() is None:
            self._prepared.add(key)

    def _copy(self, wanted: Wanted) -> RowAdapter:
        taken = self.host.take([(key_of(wanted.file, wanted.base), wanted)])
        assert taken is not None, "one at a time, and none is larger than the host's budget"
        (kept,) = taken
        try:
            return kept.value.result().to(wanted.base.device, wanted.base.dtype)
        finally:
            self.host.give_back(kept)


def key_of(file: AdapterFile, base: Any) -> Key:
    return file.digest, base.fingerprint


def method_of(path: Path) -> str:
    return read_header(path).metadata.get(METHOD_KEY, "lora")


class About(NamedTuple):
    """by_row: whether it can act on single rows; tensors: how many; elements: of them all, by the
    bytes one takes in the file"""

    method: str
    by_row: bool
    tensors: int
    elements: Mapping[int, int]


def about(adapter: AdapterFile) -> About:
    """What the file's header says. Raises InvalidRequest for an unsound file."""
    said: About = named(adapter, lambda: _about(adapter))
    return said


@lru_cache(maxsize=4096)
def _about(adapter: AdapterFile) -> About:
    """Kept: it is asked again and again while an order waits for room."""
    elements: Counter[int] = Counter()
    header = read_header(adapter.path)
    for tensor in header.tensors.values():
        elements[ITEM_BYTES[tensor.dtype]] += math.prod(tensor.shape)
    method = header.metadata.get(METHOD_KEY, "lora")
    return About(method, find.acts_on_rows(header), len(header.tensors), elements)


def check(adapter: AdapterFile, base_folder: Path) -> None:
    """Raises InvalidRequest, with the adapter's name, unless the file is whole and fits.

    It is read through once, and again only after it has changed on disk: a base puts adapters on
    and off in each step where regions are composed in the latents, and files of whole bases have
    gigabytes.
    """

    def look() -> None:
        found = adapter.path.stat()
        _sound(
            adapter.path,
            adapter.digest,
            base_folder,
            (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns),
        )

    named(adapter, look)


@lru_cache(maxsize=4096)
def _sound(path: Path, digest: str, base_folder: Path, stamp: tuple[int, ...]) -> None:
    check_registered(path, digest, base_folder)


def named(adapter: AdapterFile, look: Callable[[], Any]) -> Any:
    """What `look` returns; what it raises has the adapter's name."""
    try:
        return look()
    except InvalidRequest as error:
        raise InvalidRequest(f"{adapter.ref}: {error.detail}", error.fields) from error
    except FileNotFoundError as error:
        raise InvalidRequest(f"{adapter.ref}: its file is gone.") from error


def _load(wanted: Wanted) -> RowAdapter:
    """What it raises names no adapter: orders share it, each of which has a name of its own."""
    file, base = wanted.file, wanted.base
    check_registered(file.path, file.digest, base.folder)
    adapter = find.rows_of(method_of(file.path))(base, file.path)
    base.edits.check(adapter)
    return adapter.to(torch.device("cpu"), base.dtype)


def _bytes(wanted: Wanted) -> int:
    """An upper bound."""
    least: int = wanted.base.dtype.itemsize
    about = _about(wanted.file)
    numbers = sum(count * max(least, each) for each, count in about.elements.items())
    return numbers + about.tensors * AROUND_A_TENSOR
