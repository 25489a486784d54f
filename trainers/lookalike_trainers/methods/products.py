"""Products of thin matrices beside a base's layers: how every kind of LoRA is worn. Torch.

    y + c (W' - W) x,    W' = W + B A,    or DoRA's W' = g (W + B A), g = m / ||W + B A||

A hook on each of the base's own layers adds it to what the layer says (y = W x + b). So products
add up, whatever else is worn, and come off in any order without a trace.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike_registry.products import Product
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.method import TakeOff, Wearer

Mask = Callable[[torch.Tensor], torch.Tensor]


def wear_products(
    wearer: Wearer,
    products: Mapping[str, Product],
    scale: float,
    mask: Mask = lambda hidden: hidden,
) -> TakeOff:
    """Let `scale` times each product act.

    Args:
        mask: what becomes of A x, [n, ..., rank] or [n, rank, h, w], before B.

    Raises KeyError for a module the base does not have (check_tensors and check_against_base say
    it to users before).
    """
    layers = layers_of(wearer)
    with ExitStack() as undo:
        for name, product in products.items():
            layer = layers[name]
            handle = layer.register_forward_hook(_hook(layer, product, scale, mask))
            undo.callback(handle.remove)
        return undo.pop_all().close


def layers_of(wearer: Wearer) -> dict[str, Any]:
    """All that products can act beside, by `<part>.<module>`."""
    return {
        f"{part}.{name}": layer
        for part, model in parts_of(wearer).items()
        for name, layer in own_layers(model).items()
    }


def own_layers(model: nn.Module) -> dict[str, Any]:
    """The base's own linear layers and convolutions by their names in its files.

    Layers put around them (PEFT's, T-LoRA's) keep them as `base_layer`.
    """
    return {
        name.replace(".base_layer", "").removeprefix("text_model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _hook(layer: Any, product: Product, scale: float, mask: Mask) -> Any:
    weight = layer.weight
    down, up = product.down.to(weight), product.up.to(weight)
    gain = None
    if product.magnitude is not None:
        whole = weight.flatten(1).float() + up.flatten(1).float() @ down.flatten(1).float()
        magnitude = product.magnitude.flatten().to(weight.device)
        gain = (magnitude / whole.norm(dim=1)).to(weight.dtype)
        if weight.dim() == 4:
            gain = gain.view(-1, 1, 1)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        change = change_by(layer, down, up, x, mask)
        if gain is not None:
            change = gain * change + (gain - 1) * apply(layer, layer.weight, x)
        return y + scale * change

    return hook


def change_by(
    layer: Any,
    down: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    mask: Mask = lambda hidden: hidden,
) -> torch.Tensor:
    """B M A x beside a layer."""
    hidden = mask(apply(layer, down, x))
    return functional.linear(hidden, up) if up.dim() == 2 else functional.conv2d(hidden, up)


def apply(layer: Any, tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the layer would say with this weight and no bias."""
    if tensor.dim() == 2:
        return functional.linear(x, tensor)
    return functional.conv2d(x, tensor, None, layer.stride, layer.padding, layer.dilation)
