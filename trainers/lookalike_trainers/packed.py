"""Frozen layers on the CPU, their weights laid out once as the fastest kernels want them. Torch.

oneDNN's convolutions and matrix products reorder a weight in every call, forwards and backwards.
A frozen weight needs that once; and a frozen layer's backward pass is itself such a layer:

    linear        y = x W^T + b        dx = dy W
    convolution   y = W * x + b        dx = flip(W)^T * dy     (stride 1; channels swapped)
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

MAX_BYTES = 512 * 2**20
"""Of frozen weights: each is held twice more. In larger models reordering hardly counts."""

mkldnn = torch.ops.mkldnn


def pack_frozen_layers(model: nn.Module) -> int:
    """Let frozen float32 Conv2d and Linear layers on the CPU run packed; returns how many will.

    Parameters, their names and values up to rounding stay as they are; each layer packs its weight
    when it is first called. Weights must not change afterwards.
    """
    packed: list[tuple[nn.Module, _PackedConv | _PackedLinear]] = []
    size = 0
    for layer in model.modules():
        if type(layer) is nn.Linear and _is_frozen(layer.weight):
            packed.append((layer, _PackedLinear(layer)))
            size += layer.weight.nbytes
        elif type(layer) is nn.Conv2d and _is_frozen(layer.weight) and _can_be_turned_round(layer):
            packed.append((layer, _PackedConv(layer)))
            size += layer.weight.nbytes
    if not torch.backends.mkldnn.is_available() or size > MAX_BYTES:
        return 0
    for layer, forward in packed:
        layer.forward = forward
    return len(packed)


def _is_frozen(weight: torch.Tensor) -> bool:
    cpu = weight.device.type == "cpu"
    return cpu and weight.dtype == torch.float32 and not weight.requires_grad


def _can_be_turned_round(layer: nn.Conv2d) -> bool:
    """Whether its backward pass is a plain convolution too."""
    return (
        layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and all(p < k for p, k in zip(layer.padding, layer.kernel_size, strict=True))
    )


class _PackedLinear:
    """A frozen Linear's forward; weight [out, in], x [..., in]."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.forwards: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.forwards is None:
            rows = x.numel() // x.shape[-1]
            self.forwards = mkldnn._reorder_linear_weight(self.weight, rows)
            self.backwards = mkldnn._reorder_linear_weight(self.weight.t().contiguous(), rows)
        y: torch.Tensor = _Frozen.apply(x, self)
        return y

    def value(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = mkldnn._linear_pointwise(x, self.forwards, self.bias, "none", [], "")
        return y

    def slope(self, dy: torch.Tensor) -> torch.Tensor:
        dx: torch.Tensor = mkldnn._linear_pointwise(dy, self.backwards, None, "none", [], "")
        return dx


class _PackedConv:
    """A frozen Conv2d's forward; weight [out, in, h, w], x [n, in, height, width]."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.weight, self.bias = layer.weight.detach(), layer.bias
        assert not isinstance(layer.padding, str)
        sides = zip(layer.kernel_size, layer.padding, strict=True)
        self.padding = list(layer.padding)
        self.other_padding = [kernel - 1 - padding for kernel, padding in sides]
        self.forwards: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.forwards is None:
            flipped = self.weight.flip(2, 3).transpose(0, 1).contiguous()
            output = [len(x), len(self.weight), *x.shape[2:]]
            self.forwards = self._packed(self.weight, self.padding, list(x.shape))
            self.backwards = self._packed(flipped, self.other_padding, output)
        y: torch.Tensor = _Frozen.apply(x, self)
        return y

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolved(x, self.forwards, self.bias, self.padding)

    def slope(self, dy: torch.Tensor) -> torch.Tensor:
        return self._convolved(dy, self.backwards, None, self.other_padding)

    def _packed(self, weight: torch.Tensor, padding: list[int], shape: list[int]) -> torch.Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed: torch.Tensor = reorder(weight.to_mkldnn(), padding, [1, 1], [1, 1], 1, shape)
        return packed

    def _convolved(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, padding: list[int]
    ) -> torch.Tensor:
        y: torch.Tensor = mkldnn._convolution_pointwise(
            x, weight, bias, padding, [1, 1], [1, 1], 1, "none", [], ""
        )
        return y


class _Frozen(torch.autograd.Function):
    """A packed layer to autograd: only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        y: torch.Tensor = layer.value(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.slope(dy), None
