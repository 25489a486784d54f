"""Perfusion's gate (Tewel et al. 2023): what K and V say of one word is answered anew. Torch.

For a W of the cross-attention's K and V, and each text encoding e: [d],

    h = W e - (s / E) W i + sigmoid((s / E - beta) / tau) o        (eq. 4 and 5)

    s = e^T C^-1 i,    E = i^T C^-1 i

What lies along the concept's encoding i, in the metric of C (covariance.py), is answered by o
instead. W is the layer's weight as it is then: where other adapters have changed it, it is what
the changed weight says of i that goes. Products that act beside the layer are not in it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from lookalike_trainers.methods.method import TakeOff

TRAINING = (0.75, 0.1)  # beta, tau
WORN = (0.70, 0.15)


def edit(
    e: torch.Tensor,
    answer: torch.Tensor,
    base_answer: torch.Tensor,
    encoding: torch.Tensor,
    direction: torch.Tensor,
    gate: tuple[float, float],
) -> torch.Tensor:
    """h - W e: [n, tokens, out] of encodings e [n, tokens, d].

    Args:
        answer: o, [out]; base_answer: W i, [out].
        encoding: i, [d]; direction: C^-1 i, [d].
        gate: beta and tau.
    """
    beta, tau = gate
    share = _share(e, encoding, direction)
    return torch.sigmoid((share - beta) / tau) * answer - share * base_answer


@dataclass(frozen=True, eq=False)
class Gate:
    """One concept's edits: i [d], C^-1 i [d], and o [out] by the names of layers in the base.

    scale: of the terms, beside the adapter's own
    """

    encoding: torch.Tensor
    direction: torch.Tensor
    answers: Mapping[str, torch.Tensor]
    scale: float = 1.0

    def edit(self, name: str, layer: Any, e: torch.Tensor) -> torch.Tensor:
        """scale (h - W e), W being the layer's."""
        said = _say(layer.weight, self.encoding)
        change = edit(e, self.answers[name], said, self.encoding, self.direction, WORN)
        return self.scale * change

    def edit_of(self, delta: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """What is more in it if W has changed by `delta`, D: scale (-(s / E) D i)."""
        share = _share(e, self.encoding, self.direction)
        return -self.scale * share * _say(delta, self.encoding)

    def to(self, device: torch.device) -> "Gate":
        """A copy, which is in no file."""
        answers = {name: o.to(device, copy=True) for name, o in self.answers.items()}
        encoding = self.encoding.to(device, copy=True)
        return Gate(encoding, self.direction.to(device, copy=True), answers, self.scale)


_worn: WeakKeyDictionary[nn.Module, list[tuple[Gate, float]]] = WeakKeyDictionary()


def wear_gates(layers: Mapping[str, Any], gates: Sequence[Gate], scale: float) -> TakeOff:
    """Add `scale` times each edit to what its layer says; gates are where the layers are."""
    with ExitStack() as undo:
        for gate in gates:
            for name in gate.answers:
                undo.callback(_put_on(name, layers[name], gate, scale))
        return undo.pop_all().close


def gates_on(layer: nn.Module) -> Sequence[tuple[Gate, float]]:
    """Those that the layer wears, and their adapters' scales."""
    return tuple(_worn.get(layer, ()))


def _put_on(name: str, layer: Any, gate: Gate, scale: float) -> TakeOff:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y + (scale * gate.edit(name, layer, args[0])).to(y.dtype)

    worn, me = _worn.setdefault(layer, []), (gate, scale)
    with ExitStack() as undo:
        worn.append(me)
        undo.callback(worn.remove, me)
        undo.callback(layer.register_forward_hook(hook).remove)
        return undo.pop_all().close


def _share(e: torch.Tensor, encoding: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """s / E, [n, tokens, 1]."""
    shares = (e.to(direction.dtype) * direction).sum(-1, keepdim=True)
    return shares / (encoding * direction).sum()


def _say(weight: torch.Tensor, encoding: torch.Tensor) -> torch.Tensor:
    return functional.linear(encoding.to(weight.dtype), weight)
