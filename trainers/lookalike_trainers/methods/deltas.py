"""Changes of a base's own parameters, added where an adapter is worn. Torch.

    W_worn = W_base + sum over what is worn of scale * delta

Several adapters may change one parameter and be taken off in any order: the base's own values are
kept aside while any is worn, and put back, every bit of them, with the last.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lookalike_trainers.methods.method import TakeOff, Wearer

PREFIX = "delta."


class _Worn:
    """One parameter's own values, and what is added to them at present.

    The sum is a tensor of its own: the base's values are not copied, to be kept or to be put back.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.own = parameter.data
        self.added: dict[object, tuple[torch.Tensor, float]] = {}

    def apply(self, parameter: nn.Parameter) -> None:
        parameter.data = self._total()

    def _total(self) -> torch.Tensor:
        if not self.added:
            return self.own
        total = self.own
        for delta, scale in self.added.values():  # in float32, one parameter at a time
            total = torch.add(total, delta.to(total.device, torch.float32), alpha=scale)
        return total.to(self.own.dtype)


_worn = WeakTensorKeyDictionary()


def named(part: nn.Module) -> dict[str, nn.Parameter]:
    """A part's parameters by the names they have in the base's files.

    Whatever is worn beside: PEFT's layers wrap the base's, learned words its embedding table.
    """
    return {
        name.replace(".base_layer.", ".")
        .replace("token_embedding.table.", "token_embedding.")
        .removeprefix("text_model."): parameter
        for name, parameter in part.named_parameters()
    }


def parts_of(wearer: Any) -> dict[str, Any]:
    """Models by their names in adapter files, of a Wearer or a Denoiser."""
    encoders = {part_name(place): encoder for place, encoder in enumerate(wearer.text_encoders)}
    return {"unet": wearer.unet, **encoders}


def parameters_of(wearer: Any) -> dict[str, nn.Parameter]:
    """All parameters by `<part>.<parameter>`, as adapter files name them."""
    return {
        f"{part}.{name}": parameter
        for part, model in parts_of(wearer).items()
        for name, parameter in named(model).items()
    }


def base_values(wearer: Any) -> dict[str, torch.Tensor]:
    """The base's own values of all parameters, by the same names, whatever deltas are worn."""
    return {
        name: _worn[parameter].own if parameter in _worn else parameter.detach()
        for name, parameter in parameters_of(wearer).items()
    }


def part_name(place: int) -> str:
    """Of the text encoder at this place, from 0: text_encoder, text_encoder_2."""
    return f"text_encoder_{place + 1}" if place else "text_encoder"


def differences(
    trained: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """trained - base, float32 on the CPU, of each trained parameter, as wear_deltas takes them."""
    return {
        f"{PREFIX}{name}": tensor.detach().float().cpu() - base[name].detach().float().cpu()
        for name, tensor in trained.items()
    }


def wear_deltas(wearer: Wearer, tensors: Mapping[str, torch.Tensor], scale: float) -> TakeOff:
    """Add `scale` times each `delta.<part>.<parameter>` among the tensors of an adapter file.

    Raises KeyError for a parameter the base does not have (tensor_file.check_tensors says it
    to users before).
    """
    parameters = parameters_of(wearer)
    changes = {
        parameters[key.removeprefix(PREFIX)]: delta
        for key, delta in tensors.items()
        if key.startswith(PREFIX)
    }
    with ExitStack() as undo:
        for parameter, delta in changes.items():
            undo.callback(_add(parameter, delta, scale))
        return undo.pop_all().close


def _add(parameter: nn.Parameter, delta: torch.Tensor, scale: float) -> TakeOff:
    if parameter not in _worn:
        _worn[parameter] = _Worn(parameter)
    worn, me = _worn[parameter], object()

    def take_off() -> None:
        del worn.added[me]
        worn.apply(parameter)
        if not worn.added:
            del _worn[parameter]

    with ExitStack() as undo:
        worn.added[me] = delta, scale
        undo.callback(take_off)
        worn.apply(parameter)
        return undo.pop_all().close
