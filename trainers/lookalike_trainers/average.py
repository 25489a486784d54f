"""The moving average of what trains, often a better model than the last step's. Torch.

    m_n = d_n m_(n-1) + (1 - d_n) w_n,    d_n = min(decay, (1 + n) / (10 + n)),    m_0 = w_0

(Polyak & Juditsky 1992). The first steps forget quickly, so that short runs do not average over
their start. Under ZeRO 3 each process averages its own share, which is exact: it is element-wise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Average:
    """m of each trainable of a module that the engine has prepared; `steps`: n so far."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._trainables = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._average = {n: _share(p).clone() for n, p in self._trainables.items()}

    def update(self) -> None:
        """After each optimiser step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self._trainables.items():
            self._average[name].lerp_(_share(parameter), 1 - decay)

    def whole(self, name: str) -> torch.Tensor:
        """m of a trainable, in its shape; every process must ask for it."""
        average = self._average[name]
        parameter: Any = self._trainables[name]  # ZeRO 3 gives it more attributes
        if not _is_shared(parameter):
            return average
        shares = [torch.empty_like(average) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shares, average)
        return torch.cat(shares)[: parameter.ds_numel].view(parameter.ds_shape)

    def load(self, steps: int, averages: dict[str, torch.Tensor]) -> None:
        """Go on from averages as `whole` gave them. Raises KeyError if they are of others."""
        self.steps = steps
        for name, parameter in self._trainables.items():
            average, whole = self._average[name], averages[name].flatten()
            start = average.numel() * torch.distributed.get_rank() if _is_shared(parameter) else 0
            mine = whole[start : start + average.numel()].to(average.device)
            average.view(-1)[: len(mine)].copy_(mine)

    def take_over(self) -> None:
        """The module's weights become the averages."""
        for name, parameter in self._trainables.items():
            _write(parameter, self.whole(name))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module's weights are the averages."""
        kept = {name: _read(parameter) for name, parameter in self._trainables.items()}
        self.take_over()
        try:
            yield
        finally:
            for name, parameter in self._trainables.items():
                _write(parameter, kept[name])


def _is_shared(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 keeps a share of it in each process."""
    return hasattr(parameter, "ds_tensor")


def _share(parameter: nn.Parameter) -> torch.Tensor:
    """This process's share, or all of it."""
    share: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return share.detach()


def _read(parameter: nn.Parameter) -> torch.Tensor:
    with _gathered(parameter):
        return parameter.detach().clone()


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    with _gathered(parameter, modifier_rank=0), torch.no_grad():
        parameter.copy_(value)


@contextmanager
def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    if not _is_shared(parameter):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(parameter, modifier_rank=modifier_rank):
        yield
