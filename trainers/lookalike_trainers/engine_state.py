"""What a run has learned so far, whole, whatever share of it each process holds. Torch.

    weight/<parameter>, exp_avg/<parameter>, exp_avg_sq/<parameter>    fp32, of its shape
    buffer/<buffer>                                                    the module's persistent ones
    average/<parameter>                                                with ema_decay
    step                                                               optimiser steps taken

With 8-bit moments, in place of exp_avg and exp_avg_sq what bitsandbytes keeps of them: state1,
state2, and where those are bytes their scales (absmax1, …) and code books (qmap1, …).

The tensors are those of one process without ZeRO, so a run may go on with another number of
processes or at another ZeRO stage. Of the frozen weights nothing is kept: the base has them.
"""

from typing import Any

import torch
from torch import nn

from lookalike_trainers.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's (Loshchilov & Hutter 2019)


def gather(engine: Engine, module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state on the CPU; every process must call it, after at least one step."""
    _link(engine)
    tensors = {}
    for name, parameter in _trainables(module):
        tensors[f"weight/{name}"] = _get(engine, parameter, None)
        for moment in _moments(engine, parameter):
            tensors[f"{moment}/{name}"] = _get(engine, parameter, moment)
        if engine.average:
            tensors[f"average/{name}"] = engine.average.whole(name)
    tensors |= {f"buffer/{name}": buffer for name, buffer in _buffers(module)}
    state = next(iter(_optimizer(engine).state.values()))
    tensors["step"] = torch.as_tensor(state["step"])
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def scatter(engine: Engine, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put a gathered state into a fresh engine; every process must call it.

    Raises KeyError if the state is of other trainables.
    """
    _allocate(engine, module, tensors)
    if engine.average:
        averages = {name: tensors[f"average/{name}"] for name, _ in _trainables(module)}
        engine.average.load(int(tensors["step"]), averages)
    for name, parameter in _trainables(module):
        with _whole(engine, parameter), torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        for moment in (None, *_moments(engine, parameter)):
            value = tensors[f"{moment or 'weight'}/{name}"].to(engine.device)
            _set(engine, parameter, moment, value)
    for name, buffer in _buffers(module):
        buffer.copy_(tensors[f"buffer/{name}"])


def _buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What a method keeps besides weights, equal on all processes; a base has none."""
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def _trainables(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _optimizer(engine: Engine) -> Any:
    """The torch optimiser inside accelerate's and DeepSpeed's wrappers."""
    inner = engine.optimizer.optimizer
    return inner.optimizer if engine.zero_stage else inner


def _moments(engine: Engine, parameter: nn.Parameter) -> list[str]:
    """What the optimiser keeps of a parameter besides its step."""
    if engine.zero_stage:
        return list(MOMENTS)
    state = _optimizer(engine).state[parameter]
    return [name for name, value in state.items() if name != "step" and torch.is_tensor(value)]


def _get(engine: Engine, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    if engine.zero_stage == 0:
        return parameter if moment is None else _optimizer(engine).state[parameter][moment]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def _set(engine: Engine, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    """Into the optimiser's own copy, where ZeRO keeps one, of the weight or of a moment."""
    if engine.zero_stage == 0:
        if moment is not None:
            _optimizer(engine).state[parameter][moment].copy_(value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _allocate(engine: Engine, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give the optimiser the state it would otherwise make in its first step."""
    zero, optimizer = engine.optimizer.optimizer, _optimizer(engine)
    step = tensors["step"]
    if engine.zero_stage == 0:
        torch_counts = isinstance(optimizer, torch.optim.AdamW)  # in a tensor
        for name, parameter in _trainables(module):
            state = {
                key.removesuffix(f"/{name}"): torch.empty_like(tensor, device=parameter.device)
                for key, tensor in tensors.items()
                if key.endswith(f"/{name}") and not key.startswith(("weight/", "average/"))
            }
            count = step.to(parameter.device, copy=True) if torch_counts else int(step)
            optimizer.state[parameter] = {"step": count, **state}
        return
    owned = (
        zero.fp32_partitioned_groups_flat
        if engine.zero_stage == 3
        else zero.single_partition_of_fp32_groups
    )
    for tensor in owned:
        moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        optimizer.state[tensor] = {"step": step.to(tensor.device, copy=True), **moments}
    _link(engine)


def _link(engine: Engine) -> None:
    """Let ZeRO 1 and 2 know where in the optimiser's state each parameter's share is.

    DeepSpeed does so by itself within its first step, but too early for any group after the first.
    """
    if engine.zero_stage in (1, 2):
        zero = engine.optimizer.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _whole(engine: Engine, parameter: nn.Parameter) -> Any:
    """Inside, a parameter of which ZeRO 3 holds shares can be written; each keeps its share."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(parameter, modifier_rank=0, enabled=engine.zero_stage == 3)
