"""What K and V say of a text, as a row's adapters have them, whatever the step. Torch.

    h = W e + sum of s D e + sum of s B A e + sum of s (gate o - similarity W' i)

    W' = W + sum of s D

as where the base wears all of them: a gate (gate.py) takes away what the changed weight says of i.
Here W is the base's weight with what it wears itself. What it wears beside weights acts at each
step, on top of this: its gates see W alone there, so that what they take away of D is told here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from lookalike_trainers.methods.gate import gates_on
from lookalike_trainers.methods.products import change_by
from lookalike_trainers.methods.row_adapter import Outfit


def answer(name: str, layer: Any, outfit: Outfit, e: torch.Tensor) -> torch.Tensor:
    """Of a text [n, tokens, d], by the layer of this name: [n, tokens, out].

    Without T-LoRA's products, which come and go with the step.
    """
    said = functional.linear(e, layer.weight, layer.bias)  # without the layer's hooks
    for more in _changes(name, layer, outfit, e):
        said = said + more.to(said.dtype)
    return said


def _changes(name: str, layer: Any, outfit: Outfit, e: torch.Tensor) -> Iterator[torch.Tensor]:
    deltas, gates = [], list(gates_on(layer))
    for adapter, scale in outfit:
        if name in adapter.deltas:
            deltas.append((adapter.deltas[name], scale))
        if name in adapter.products and adapter.ranks is None:
            product = adapter.products[name]
            yield scale * change_by(layer, product.down, product.up, e)
        for gate in adapter.gates:
            gates.append((gate, scale))
            yield scale * gate.edit(name, layer, e)
    for delta, scale in deltas:
        yield scale * functional.linear(e.to(delta.dtype), delta)
        for gate, more in gates:
            yield more * scale * gate.edit_of(delta, e)
