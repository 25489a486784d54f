"""Many adapters in one call of a UNet, each on its own rows of the batch. Torch.

    y_n + B_n M_n(t_n, p) A_n x_n + h_n      for row n, at its place p

Rows that wear the same make a slot. A layer's products stand side by side, A [slots, in, R] and
B [slots, R, out], ranks padded to R with zeros and those of one slot concatenated; scales are in
B. Two batched products of matrices then serve all slots (Punica, Chen et al. 2023, does so for
language models). K and V of the cross-attention depend on the text alone: `answers` computes them
once, with what adapters change of them (row_answers.py), and no step asks for them again.
M is row_masks.py's; the places matter where a picture has regions (layout.py).

A batch of a single slot is changed by each product as `products.py` does it, to the bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.methods.layout import Layout, hear_own_region
from lookalike_trainers.methods.products import change_by, own_layers
from lookalike_trainers.methods.row_adapter import Outfit, RowAdapter
from lookalike_trainers.methods.row_answers import answer
from lookalike_trainers.methods.row_masks import Mask, Worn, mask_of, masked
from lookalike_trainers.methods.text_by_layer import cross_attention, take_own_text

Rows = slice | torch.Tensor
Answers = Mapping[str, torch.Tensor]
"""What K's and V's layers say of a text, [rows, tokens, out] by their names."""
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a layer's input x and answer y the changed answer; y may be overwritten."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Rows that stand together in a batch and wear the same.

    answers: as `RowEdits.answers` gives them, of all slots or of none: without them K and V are the
        base's own, asked for at each step
    layout: where of a picture each adapter acts, and each token is heard; None is everywhere
    """

    outfit: Outfit
    rows: int
    answers: Answers = field(default_factory=dict)
    layout: Layout | None = None


class RowEdits:
    """What the rows of a UNet's batch wear; its weights stay as they are."""

    def __init__(self, unet: nn.Module) -> None:
        self._layers = own_layers(unet)
        self._readers = cross_attention(unet)
        places = {module: place for place, module in enumerate(self._readers)}
        self._heard = {
            f"{name}.{end}": places[module]
            for name, module in unet.named_modules()
            if module in places
            for end in ("to_k", "to_v")
        }
        self._on = ExitStack()
        self._slots: list[Slot] | None = []
        self._timesteps = torch.zeros(0)
        unet.register_forward_pre_hook(self._see, with_kwargs=True)
        take_own_text(unet)

    def check(self, adapter: RowAdapter) -> None:
        """Raises InvalidRequest for changes of layers that the UNet does not have."""
        unknown = [
            FieldProblem(name, "is no layer of the base model, or none that reads the text")
            for names, layers in (
                (adapter.products, self._layers),
                (adapter.deltas, self._heard),
                *((gate.answers, self._heard) for gate in adapter.gates),
            )
            for name in names
            if name not in layers
        ]
        if unknown:
            raise InvalidRequest("Not all of the adapter would act on this base.", unknown)

    def answers(self, outfit: Outfit, text: torch.Tensor) -> Answers:
        """K and V of a text as an outfit has them, whatever the step.

        The base wears what it will wear at the steps.

        Args:
            text: features [rows, tokens, d], or by layer [rows, L, tokens, d].
        """
        own = text.unbind(1) if text.dim() == 4 else [text] * len(self._readers)
        return {
            name: answer(name, self._layers[name], outfit, own[place])
            for name, place in self._heard.items()
        }

    def put_on(self, slots: Sequence[Slot]) -> None:
        """From now on the batch's rows wear this, slot after slot, and nothing else.

        The very slots that they wear already cost nothing.

        Raises ValueError if some of them have regions, or answers, and others have none.
        """
        if self._slots == list(slots):
            return
        if len({bool(slot.answers) for slot in slots}) > 1:
            raise ValueError("of some rows K and V are known, and of others they are not")
        self._slots = None  # until all of them are on
        self._on.close()
        merged = _merged(slots)
        for name, layer in self._layers.items():
            changes = list(self._changes(name, layer, merged))
            if slots and name in slots[0].answers:
                said = torch.cat([slot.answers[name] for slot in slots])
                layer.forward = _says(said, kept=bool(changes))  # goes before the class's own
                self._on.callback(delattr, layer, "forward")
            if changes:
                self._on.callback(layer.register_forward_hook(_hook(changes)).remove)
        layouts = [slot.layout for slot in slots for _ in range(slot.rows) if slot.layout]
        if layouts:
            if len(layouts) < sum(slot.rows for slot in slots):
                raise ValueError("rows with regions and rows without read texts of other lengths")
            for handle in hear_own_region(self._readers, layouts):
                self._on.callback(handle.remove)
        self._slots = list(slots)

    def _changes(self, name: str, layer: Any, slots: Sequence[Slot]) -> Iterator[Change]:
        worn = [self._worn(name, slot) for slot in slots]
        if len(slots) == 1:
            yield from (self._alone(name, layer, one, slots[0]) for one in worn[0])
        elif any(worn):
            yield self._stacked(name, layer, slots, worn)

    def _worn(self, name: str, slot: Slot) -> list[Worn]:
        """The products that act at every step."""
        homes = slot.layout.homes if slot.layout else (None,) * len(slot.outfit)
        return [
            Worn(adapter.products[name].down, adapter.products[name].up, scale, adapter.ranks, home)
            for (adapter, scale), home in zip(slot.outfit, homes, strict=True)
            if name in adapter.products and (adapter.ranks or name not in self._heard)
        ]

    def _alone(self, name: str, layer: Any, worn: Worn, slot: Slot) -> Change:
        mask = self._mask(name, [[worn]] * slot.rows, [slot.layout] * slot.rows, slice(None))

        def act(hidden: torch.Tensor) -> torch.Tensor:
            return masked(mask, hidden, worn.down.dim()) if mask else hidden

        def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y + worn.scale * change_by(layer, worn.down, worn.up, x, act)

        return change

    def _stacked(
        self, name: str, layer: Any, slots: Sequence[Slot], worn: Sequence[list[Worn]]
    ) -> Change:
        """One change for all rows that wear something here."""
        acting = [(slot, one) for slot, one in zip(slots, worn, strict=True) if one]
        each = [side for slot, side in acting for _ in range(slot.rows)]
        layouts = [slot.layout for slot, _ in acting for _ in range(slot.rows)]
        even = len({slot.rows for slot, _ in acting}) == 1
        sides = [side for _, side in acting] if even else each  # else each row is a slot of its own
        where = _rows(slots, worn)
        mask = self._mask(name, each, layouts, where)
        multiply = _linear if layer.weight.dim() == 2 else _convolve
        return multiply(layer, sides, where, mask)

    def _mask(
        self,
        name: str,
        rows: Sequence[list[Worn]],
        layouts: Sequence[Layout | None],
        where: Rows,
    ) -> Mask | None:
        return mask_of(rows, lambda: self._timesteps[where], layouts, name in self._heard)

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The UNet's forward pre-hook: note each row's timestep, [rows]."""
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        self._timesteps = t.reshape(-1).to(args[0].device).expand(len(args[0]))


def _merged(slots: Sequence[Slot]) -> list[Slot]:
    """Neighbours that wear the same in the same places as one slot."""
    whole = []
    for (outfit, layout), same in groupby(slots, key=lambda slot: (slot.outfit, slot.layout)):
        whole.append(Slot(outfit, sum(slot.rows for slot in same), layout=layout))
    return whole


def _rows(slots: Sequence[Slot], acts: Sequence[Any]) -> Rows:
    """The rows of the slots that act: a slice if they stand together, so that nothing is copied."""
    each = [bool(act) for slot, act in zip(slots, acts, strict=True) for _ in range(slot.rows)]
    places = [place for place, act in enumerate(each) if act]
    if len(places) == places[-1] - places[0] + 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places)


def _hook(changes: Sequence[Change]) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        for change in changes:
            y = change(inputs[0], y)
        return y

    return hook


def _says(said: torch.Tensor, *, kept: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer's forward that knows the answer; `kept` from changes, which may overwrite it."""
    return lambda e: said.clone() if kept else said


def _linear(
    layer: Any,
    sides: Sequence[list[Worn]],
    where: Rows,
    mask: Mask | None,
) -> Change:
    """x and y: [rows, ..., in] and [rows, ..., out]."""
    width = max(sum(len(one.down) for one in side) for side in sides)
    down = layer.weight.new_zeros(len(sides), layer.in_features, width)
    up = layer.weight.new_zeros(len(sides), width, layer.out_features)
    for slot, side in enumerate(sides):
        column = 0
        for one in side:
            columns = slice(column, column := column + len(one.down))
            down[slot, :, columns] = one.down.T
            up[slot, columns] = one.scale * one.up.T

    def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen = x[where]
        hidden = torch.bmm(seen.reshape(len(sides), -1, x.shape[-1]), down)
        if mask:
            hidden = mask(hidden.view(len(seen), -1, width)).view(hidden.shape)
        y[where] += torch.bmm(hidden, up).view(*seen.shape[:-1], -1)
        return y

    return change


def _convolve(
    layer: Any,
    sides: Sequence[list[Worn]],
    where: Rows,
    mask: Mask | None,
) -> Change:
    """x and y: [rows, channels, height, width]; slots are groups of channels."""
    slots, channels, out = len(sides), layer.in_channels, layer.out_channels
    width = max(sum(len(one.down) for one in side) for side in sides)
    down = layer.weight.new_zeros(slots, width, channels, *layer.kernel_size)
    up = layer.weight.new_zeros(slots, out, width, 1, 1)
    for slot, side in enumerate(sides):
        column = 0
        for one in side:
            columns = slice(column, column := column + len(one.down))
            down[slot, columns] = one.down
            up[slot, :, columns] = one.scale * one.up

    def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen = x[where].unflatten(0, (slots, -1)).transpose(0, 1).flatten(1, 2)
        hidden = functional.conv2d(
            seen, down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, slots
        )
        if mask:
            rows = hidden.unflatten(1, (slots, width)).transpose(0, 1).flatten(0, 1)
            rows = masked(mask, rows, 4)
            hidden = rows.unflatten(0, (slots, -1)).transpose(0, 1).flatten(1, 2)
        said = functional.conv2d(hidden, up.flatten(0, 1), groups=slots)
        y[where] += said.unflatten(1, (slots, out)).transpose(0, 1).flatten(0, 1)
        return y

    return change
