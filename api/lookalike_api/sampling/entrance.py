"""How orders come into memory, in turn, as far as there is room. Imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lookalike_api.sampling.ends import told
from lookalike_api.sampling.loading import Adapters, about, named
from lookalike_api.sampling.messages import SampleOrder
from lookalike_api.sampling.models import ResidentBase, ResidentBases
from lookalike_api.sampling.painting import Painting

# An order that finds no room is passed by so many others at most.
PASSES = 16

Say = Callable[[int, dict[str, Any]], None]
"""Called with an order's number and what is to be said of it; see messages.py. From any thread."""


@dataclass(eq=False)
class Waiting:
    """An order that has nothing in memory yet."""

    number: int
    order: SampleOrder
    passed: int = 0

    @property
    def late(self) -> bool:
        return self.order.late


class Entrance:
    """Orders that wait for room in memory, and those that have it, whose adapters load.

    wake: called, from any thread, when there may be something to do again.
    """

    def __init__(
        self, bases: ResidentBases, adapters: Adapters, say: Say, wake: Callable[[], None]
    ) -> None:
        self._bases, self._adapters, self._say, self._wake = bases, adapters, say, wake
        self._waiting: list[Waiting] = []
        self.loading: list[Painting] = []

    def accept(self, number: int, order: SampleOrder) -> None:
        self._waiting.append(Waiting(number, order))

    def drop(self, which: Callable[[Waiting], bool]) -> list[Waiting]:
        """Those that wait for room no more."""
        dropped = [one for one in self._waiting if which(one)]
        self._waiting = [one for one in self._waiting if one not in dropped]
        return dropped

    def let_in(self, painted: Sequence[ResidentBase]) -> None:
        """Orders in turn, as far as there is room for their bases, beside those that are being
        painted with, and for their adapters.

        Those that need nothing but what is there pass those that there is no room for: they push
        out nothing, but hold what they need, and so no more than `PASSES` pass anyone.
        """
        blocked: list[Waiting] = []
        for one in list(self._waiting):
            try:
                painting = self._opened(one, painted, only_there=bool(blocked))
            except Exception as error:
                self._waiting.remove(one)
                self._say(one.number, told(error))
                continue
            if painting is None:
                blocked.append(one)
            else:
                self._waiting.remove(one)
                self.loading.append(painting)
                for other in blocked:
                    other.passed += 1
            if any(other.passed >= PASSES for other in blocked):
                return

    def loaded(self) -> list[Painting]:
        """Those whose adapters have been loaded, or could not be, go on."""
        loaded = [painting for painting in self.loading if painting.loaded]
        self.loading = [painting for painting in self.loading if painting not in loaded]
        return loaded

    def settle(self, painting: Painting) -> None:
        """Raises what loading or checking an adapter raised, with this order's name for it."""
        for check in painting.checks:
            check.result()
        for file, kept in painting.taken:
            named(file, kept.value.result)

    def leave(self, painting: Painting) -> None:
        """What it had in memory may make room again, for an order of which it was said that there
        is none: it is let in at the next turn."""
        if painting in self.loading:
            self.loading.remove(painting)
        for check in painting.checks:
            check.cancel()  # one that has not begun: others wait for theirs
        cache = self._adapters.of(painting.base)
        while painting.taken:
            cache.give_back(painting.taken.pop()[1])
        self._wake()

    def _opened(
        self, one: Waiting, painted: Sequence[ResidentBase], *, only_there: bool
    ) -> Painting | None:
        """With its base there and its adapters pinned and loading; None while there is no room."""
        order = one.order
        in_use = [*painted, *(painting.base for painting in self.loading)]
        base = self._bases.get(
            order.base_fingerprint,
            order.base_folder,
            order.device,
            in_use,
            only_there=only_there,
        )
        if base is None:
            return None
        said = {file: about(file) for file in order.files}
        by_row = [file for file in said if said[file].by_row]
        self._adapters.check(base, by_row)
        kept = self._adapters.take(base, by_row, only_there=only_there)
        if kept is None:
            return None
        # Nothing may be raised from here on: what is taken would never be given back.
        checks = [
            check
            for file in said
            if not said[file].by_row
            for check in self._adapters.look_through(base, file, said[file].method)
        ]
        for check in checks:
            check.add_done_callback(lambda _: self._wake())
        for each in kept:
            each.value.add_done_callback(lambda _: self._wake())
        taken = list(zip(by_row, kept, strict=True))
        return Painting(one.number, order, base, taken, checks, alone=order.alone)
