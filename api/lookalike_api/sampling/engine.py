"""Many orders at once: one call of the denoiser a step for all that can share it. Imports torch.

order ──→ waiting ──→ group ──→ batch, step by step ──→ pictures
          its base      same base, latent size, whole-base
          and adapters  adapters and number of regions;
          load          whatever rows wear, and how they walk

A group takes more orders in before any step (continuous batching) while their pixels fit. Groups
take turns. To change what a whole base wears takes time, so that it happens only after `STRETCH`
turns, if others wait for it; where it happens within each step (regions in the latents), each
change counts as a turn.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from lookalike_api.sampling.ends import CANCELED, TOO_LATE, told
from lookalike_api.sampling.entrance import Entrance, Say, Waiting
from lookalike_api.sampling.loading import Adapters
from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_api.sampling.models import ResidentBase, ResidentBases
from lookalike_api.sampling.painting import Asked, Batch, Painting
from lookalike_api.sampling.parts import same_depth
from lookalike_api.sampling.pictures import save
from lookalike_platform.conditioning import Text, predict
from lookalike_platform.diffusion import decode

STRETCH = 32


@dataclass(eq=False)
class Group:
    """Batches that can share a call of the denoiser: those in it, and those that will join.

    worn: what the whole base wears for them; None if it changes clothes within each step
    """

    base: ResidentBase
    worn: tuple[AdapterFile, ...] | None
    waiting: deque[Batch] = field(default_factory=deque)
    acting: list[Batch] = field(default_factory=list)
    served: int = 0
    """The turn it had last, or that in which it came: who comes later is not before it."""

    @property
    def batches(self) -> list[Batch]:
        return [*self.acting, *self.waiting]


class Engine:
    """Orders come in by `accept`; each `turn` brings some of them a step further.

    All of it in one thread, except that adapters load and files are written beside it.

    wake: called, from any thread, when there may be something to do again.
    batch_pixels: of the pictures that one call of the denoiser serves; the pictures of an order are
        split into batches of so many, and one picture that is larger has a batch of its own
    """

    def __init__(
        self,
        bases: ResidentBases,
        adapters: Adapters,
        say: Say,
        wake: Callable[[], None],
        batch_pixels: int,
    ) -> None:
        self._batch_pixels = batch_pixels
        self._bases, self.adapters, self._say = bases, adapters, say
        self._entrance = Entrance(bases, adapters, say, wake)
        self._groups: dict[Hashable, Group] = {}
        self._turns = 0
        self._stretch = 0
        self._last: Group | None = None
        self._left: list[Painting] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def accept(self, number: int, order: SampleOrder) -> None:
        self._entrance.accept(number, order)

    def cancel(self, number: int) -> None:
        """Between two steps; harmless for an order that is at its end."""
        self._give_up(lambda one: one.number == number, CANCELED)

    def turn(self) -> bool:
        """One step of one group; whether there was anything to do."""
        busy = self._turn()
        # Batches hold their painting: apart, what they wore leaves memory now, and not when
        # Python collects cycles.
        while self._left:
            self._left.pop().batches.clear()
        self._bases.rest([group.base for group in self._groups.values()])
        return busy

    def _turn(self) -> bool:
        self._give_up(lambda one: one.late, TOO_LATE)
        self._entrance.let_in([painting.base for painting in self._painted()])
        self._group_loaded()
        group = self._next()
        if group is None:
            return False
        self._turns += 1
        group.served = self._turns
        self._last = group
        try:
            if group.worn is not None:
                group.base.wear(group.worn)
        except Exception as error:
            for painting in {batch.painting for batch in group.batches}:
                self._end(painting, told(error))
            return True
        self._join(group)
        if group.acting:
            with torch.inference_mode():
                self._step(group)
        return True

    @property
    def active(self) -> int:
        """Orders that are in a batch."""
        # Asked from any thread: a list of the groups is made at once.
        batches = [batch for group in list(self._groups.values()) for batch in group.acting]
        return len({batch.painting for batch in batches})

    def _give_up(self, which: Callable[[Waiting | Painting], bool], answer: dict[str, Any]) -> None:
        """Wherever they are on their way."""
        for one in self._entrance.drop(which):
            self._say(one.number, answer)
        for painting in filter(which, [*self._entrance.loading, *self._painted()]):
            self._end(painting, answer)

    def _group_loaded(self) -> None:
        for painting in self._entrance.loaded():
            try:
                self._entrance.settle(painting)
                painting.split(self._batch_pixels)
            except Exception as error:
                self._end(painting, told(error))
            else:
                self._queue(painting)

    def _queue(self, painting: Painting) -> None:
        key = (painting.base, painting.kind)
        group = self._groups.setdefault(
            key, Group(painting.base, painting.worn, served=self._turns)
        )
        group.waiting.extend(painting.batches)

    def _next(self) -> Group | None:
        """The group whose last turn is longest ago, of those for which nothing is to be changed."""
        groups = sorted(self._groups.values(), key=lambda group: group.served)
        if self._last and self._last.worn is None:  # it goes on: it has a stretch, too
            ready = [self._last]
        else:
            ready = [group for group in groups if group.worn == group.base.worn]
        if ready and (len(ready) == len(groups) or self._stretch < STRETCH):
            self._stretch += 1
            return ready[0]
        self._stretch = 0
        others = [group for group in groups if group not in ready]
        return next(iter(others), None)

    def _join(self, group: Group) -> None:
        while group.waiting:
            pixels = sum(batch.pixels for batch in group.acting)
            batch = group.waiting[0]
            if group.acting and pixels + batch.pixels > self._batch_pixels:
                break
            group.waiting.popleft()
            painting = batch.painting
            if painting.late:  # since the turn began: to load a base takes time
                self._end(painting, TOO_LATE)
                continue
            try:
                with torch.inference_mode():
                    painting.begin(batch)
            except Exception as error:
                self._end(painting, told(error))
                continue
            group.acting.append(batch)
            self._say(painting.number, {"type": "begun"})
        # Rows that wear the same stand together.
        outfits = [batch.parts[0].outfit for batch in group.acting]
        group.acting.sort(key=lambda batch: outfits.index(batch.parts[0].outfit))

    def _step(self, group: Group) -> None:
        try:  # asking takes memory too, and leaves the walks where they stand
            asked = [one for batch in group.acting for one in batch.asked()]
            if group.worn is None:
                self._stretch += max(0, _changes(asked) - 1)
            said = iter(_told_by(group.base, asked, self._batch_pixels))
        except Exception as error:
            self._apart(group, error)
            return
        for batch in list(group.acting):
            mine = [next(said) for _ in batch.parts]
            try:
                batch.answer(mine)
            except Exception as error:
                self._end(batch.painting, told(error))
        self._tell(group)
        self._decode(group)

    def _apart(self, group: Group, error: Exception) -> None:
        """A step failed, for the sake of one of them perhaps: each goes on in a batch of its own.

        Their walks stand where they stood before it.
        """
        paintings = {batch.painting for batch in group.acting}
        if len(paintings) == 1:
            self._end(paintings.pop(), told(error))
            return
        for painting in paintings:
            painting.alone = True
            mine = [batch for batch in group.batches if batch.painting is painting]
            self._remove(painting)
            key = (group.base, painting.kind)
            own = self._groups.setdefault(key, Group(group.base, group.worn, served=self._turns))
            own.acting += [batch for batch in mine if batch.walk]
            own.waiting += [batch for batch in mine if not batch.walk]

    def _tell(self, group: Group) -> None:
        for painting in {batch.painting: None for batch in group.acting}:
            step, total = painting.steps()
            self._say(painting.number, {"type": "progress", "step": step, "total": total})

    def _decode(self, group: Group) -> None:
        """Pictures of the walks that are at their end, all in one call of the autoencoder."""
        ready = [batch for batch in group.acting if batch.walk and batch.walk.done]
        if not ready:
            return
        group.acting = [batch for batch in group.acting if batch not in ready]
        try:
            _decoded(group.base, ready)
        except Exception:  # of memory, perhaps
            self._decode_one_by_one(group.base, ready)
        for painting in {batch.painting: None for batch in ready}:
            if painting.done:
                self._finish(painting)

    def _decode_one_by_one(self, base: ResidentBase, ready: list[Batch]) -> None:
        failed: set[Painting] = set()
        for batch in ready:
            if batch.painting in failed:
                continue
            try:
                _decoded(base, [batch])
            except Exception as error:
                failed.add(batch.painting)
                self._end(batch.painting, told(error))

    def _finish(self, painting: Painting) -> None:
        pictures = [picture for batch in painting.batches for picture in batch.pictures]
        number, order, warnings = painting.number, painting.order, painting.warnings
        self._leave(painting)

        def write() -> None:
            try:
                images = save(pictures, order)
            except Exception as error:
                self._say(number, told(error))
            else:
                self._say(number, {"type": "done", "images": images, "warnings": warnings})

        self._writer.submit(write)

    def _end(self, painting: Painting, answer: dict[str, Any]) -> None:
        """An end without pictures."""
        self._leave(painting)
        self._say(painting.number, answer)

    def _painted(self) -> set[Painting]:
        return {batch.painting for group in self._groups.values() for batch in group.batches}

    def _leave(self, painting: Painting) -> None:
        self._remove(painting)
        self._entrance.leave(painting)
        self._left.append(painting)

    def _remove(self, painting: Painting) -> None:
        for group in self._groups.values():
            group.acting = [batch for batch in group.acting if batch.painting is not painting]
            group.waiting = deque(b for b in group.waiting if b.painting is not painting)
        # One that is left empty would keep its base in memory when another is to take its place.
        self._groups = {key: group for key, group in self._groups.items() if group.batches}
        if self._last not in self._groups.values():
            self._last = None


def _decoded(base: ResidentBase, batches: list[Batch]) -> None:
    latents = torch.cat([batch.walk.latents for batch in batches if batch.walk])
    pictures = iter(decode(base.vae, latents))
    for batch in batches:
        batch.pictures = [next(pictures) for _ in batch.numbers]


def _changes(asked: Sequence[Asked]) -> int:
    """How often the base changes clothes in one such step after another."""
    return sum(one.worn != other.worn for one, other in pairwise([asked[-1], *asked]))


def _told_by(base: ResidentBase, asked: Sequence[Asked], most: int) -> list[torch.Tensor]:
    """What the denoiser predicts."""
    said: list[torch.Tensor] = []
    for rows in _calls(asked, most):
        base.wear(rows[0].worn)
        base.edits.put_on([one.slot for one in rows])
        said += predict(
            base.unet,
            torch.cat([one.seen for one in rows]),
            torch.cat([one.timesteps for one in rows]),
            Text.cat(same_depth([one.text for one in rows])),
        ).split([len(one.seen) for one in rows])
    return said


def _calls(asked: Sequence[Asked], most: int) -> list[list[Asked]]:
    """One for neighbours that want the base to wear the same, as far as their pixels fit."""
    calls: list[list[Asked]] = []
    for one in asked:
        call = calls[-1] if calls else []
        fits = sum(other.pixels for other in call) + one.pixels <= most
        if call and fits and call[0].worn == one.worn:
            call.append(one)
        else:
            calls.append([one])
    return calls
