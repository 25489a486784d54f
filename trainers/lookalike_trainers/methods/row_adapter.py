"""A saved adapter in memory, as single rows of a batch wear it. Torch.

Beside what it does to the text encoders, which are asked one prompt at a time, an adapter may
change a row of the UNet's batch in three ways, all sums over the adapters the row wears:

    y + scale B M(t) A x      by a product of thin matrices beside a layer; M(t): T-LoRA's ranks
    y + scale D e             where a layer's input is the text e alone (K and V of the
                              cross-attention), which makes it the same at every step
    y + scale g(e)            there, too: gates (gate.py), which see the sum of all D

What changes whole weights in any other way cannot be told apart by rows: its method has no `rows`
in catalog.METHODS, and the base wears it as a whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lookalike_registry.products import Product
from lookalike_trainers.methods.gate import Gate
from lookalike_trainers.methods.method import TakeOff, Wearer

WearText = Callable[[Wearer, Mapping[str, torch.Tensor], float, str], TakeOff]
"""Lets an adapter's `text` act on the text encoders alone: at a scale, for a word in prompts."""


@dataclass(frozen=True)
class Ranks:
    """What T-LoRA's r(t) depends on (`row_masks.ranks_at`)."""

    rank: int
    min_rank: int
    timesteps: int


@dataclass(frozen=True, eq=False)
class RowAdapter:
    """One adapter file.

    text: the tensors that act on text encoders, none for an adapter that leaves them alone.
    products: of the UNet's layers, by their names in the base.
    ranks: of all products, where they depend on the timestep.
    deltas: of K's and V's weights, [out, in], by the names of their layers in the base.
    gates: of K's and V's layers.
    """

    text: Mapping[str, torch.Tensor]
    wear_text: WearText
    products: Mapping[str, Product] = field(default_factory=dict)
    ranks: Ranks | None = None
    deltas: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gates: Sequence[Gate] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> "RowAdapter":
        """A copy, the products in the UNet's dtype; the rest keeps its own, and the text its place.

        Nothing of it is in the file any more, which what is read of safetensors keeps mapped as a
        whole.
        """
        return replace(
            self,
            text={name: x.clone() for name, x in self.text.items()},
            products={name: _moved(p, device, dtype) for name, p in self.products.items()},
            deltas={name: delta.to(device, copy=True) for name, delta in self.deltas.items()},
            gates=[gate.to(device) for gate in self.gates],
        )


Outfit = tuple[tuple[RowAdapter, float], ...]
"""What a row wears: adapters and their scales."""


class Rows(Protocol):
    """A method's entry in catalog.METHODS for adapters that act on single rows.

    Args of a call: the base, whose parts are looked at and not changed; the adapter's file, of
    which find.acts_on_rows says that it can.
    """

    def __call__(self, wearer: Wearer, file: Path) -> RowAdapter: ...


def of_unet(named: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the UNet, by the layers' own names."""
    return {name.removeprefix("unet."): x for name, x in named.items() if name.startswith("unet.")}


def of_text(named: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the text encoders."""
    return {name: x for name, x in named.items() if name.startswith("text_encoder")}


def _moved(product: Product, device: torch.device, dtype: torch.dtype) -> Product:
    tensors = {name: x for name, x in vars(product).items() if isinstance(x, torch.Tensor)}
    moved = {name: x.to(device, dtype, copy=True) for name, x in tensors.items()}
    return replace(product, **moved)
