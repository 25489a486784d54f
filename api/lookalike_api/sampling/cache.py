"""Things kept in memory within a budget of bytes, loaded beside other work. Torch-free."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lookalike_platform.errors import InvalidRequest

Key = TypeVar("Key", bound=Hashable)
Source = TypeVar("Source")
Value = TypeVar("Value")


@dataclass
class Counts:
    """What has happened since the cache began."""

    hits: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0


@dataclass(eq=False)
class Kept(Generic[Value]):
    """A value that is there, or being loaded; it stays while `pins` of its takers need it."""

    size: int
    value: "Future[Value]"
    pins: int = 0

    @property
    def stays(self) -> bool:
        return bool(self.pins) or not self.value.done()


@dataclass
class Cache(Generic[Key, Source, Value]):
    """The values used last, never more than `budget` bytes of them.

    `take` pins values until `give_back`; what is not pinned makes room, the one unused for
    longest first. A key is loaded once however many take it meanwhile. A value that could not be
    loaded is forgotten: whoever takes it next tries again. Safe to use from any thread.

    A value comes from a source, which is not kept.

    size: bytes of a source's value, known before it is loaded, so that loading keeps the budget.
    """

    name: str
    budget: int
    size: Callable[[Source], int]
    load: Callable[[Source], Value]
    loaders: ThreadPoolExecutor
    counts: Counts = field(default_factory=Counts)
    _kept: OrderedDict[Key, Kept[Value]] = field(default_factory=OrderedDict)
    # Callbacks of loads that are done at once come from the thread that asked.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def check(self, sources: Mapping[Key, Source]) -> None:
        """Raises InvalidRequest if they can never be there together, and what `size` raises."""
        total = sum(self.size(source) for source in sources.values())
        if total > self.budget:
            raise InvalidRequest(
                f"It takes {total:,} bytes, and the {self.name} has room for {self.budget:,}: "
                "raise the budget in the sampler's settings."
            )

    def take(
        self, wanted: Sequence[tuple[Key, Source]], *, only_there: bool = False
    ) -> list[Kept[Value]] | None:
        """All the values pinned, being loaded or there; none of them, and None, while what is
        pinned leaves no room for all.

        What `check` refuses never has any. Raises what `size` raises.

        only_there: None also if a load would have to begin, for which others may have to go.
        """
        sources = dict(wanted)
        with self._lock:
            missing = {key: self.size(s) for key, s in sources.items() if key not in self._kept}
            needed = sum(missing.values())
            staying = sum(k.size for key, k in self._kept.items() if k.stays or key in sources)
            if staying + needed > self.budget or (missing and only_there):
                return None  # nothing loads, and nothing makes room, for who cannot come in yet
            found = {key: self._kept[key] for key in sources if key not in missing}
            for key in found:
                self._kept.move_to_end(key)
            self._make_room(needed, sources)
            found |= {key: self._begin(key, sources[key], size) for key, size in missing.items()}
            taken = [found[key] for key, _ in wanted]
            for kept in taken:
                kept.pins += 1
            self.counts.hits += len(wanted) - len(missing)
            return taken

    def give_back(self, kept: Kept[Value]) -> None:
        """Once for each value of each `take`."""
        with self._lock:
            kept.pins -= 1

    @property
    def held(self) -> int:
        """Bytes there, and being loaded."""
        with self._lock:
            return sum(kept.size for kept in self._kept.values())

    @property
    def pinned(self) -> list[Key]:
        with self._lock:
            return [key for key, kept in self._kept.items() if kept.pins]

    def _make_room(self, needed: int, keep: Container[Key]) -> None:
        free = self.budget - sum(kept.size for kept in self._kept.values())
        for key in [key for key, kept in self._kept.items() if not kept.stays and key not in keep]:
            if needed <= free:
                break
            free += self._kept.pop(key).size
            self.counts.evictions += 1

    def _begin(self, key: Key, source: Source, size: int) -> Kept[Value]:
        self.counts.loads += 1
        self._kept[key] = kept = Kept(size, self.loaders.submit(self.load, source))
        # A callback that held `kept` would keep what is evicted until cycles are collected.
        kept.value.add_done_callback(lambda value: self._forget_failed(key, value))
        return kept

    def _forget_failed(self, key: Key, value: "Future[Value]") -> None:
        if not value.exception():
            return
        with self._lock:
            self.counts.failures += 1
            kept = self._kept.get(key)
            if kept is not None and kept.value is value:
                del self._kept[key]
