"""Products of thin matrices beside a base's layers: how every kind of LoRA is worn. Torch.

    y + c (W' - W) x,    W' = W + B A,    or DoRA's W' = g (W + B A), g = m / ||W + B A||

A hook on each of the base's own layers adds it to what the layer says (y = W x + b). So products
add up, whatever else is worn, and come off in any order without a trace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike_registry.adapter_file import KEY, LoraShape, module_scale, peft_configs
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.method import TakeOff, Wearer

PREFIX = "lora."
Mask = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Product:
    """One module's B A, with its scale s already in B.

    down: A [rank, in] or [rank, in, k, k]; up: B [out, rank] or [out, rank, 1, 1]; magnitude:
    DoRA's m [out], or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor | None = None


def read_lora(file: Path) -> dict[str, Product]:
    """The products of a LoRA file in diffusers' layout, by `<part>.<module>`."""
    from safetensors.torch import load_file

    configs = peft_configs(read_header(file), file.name)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        match = KEY.fullmatch(key)
        assert match is not None, key  # check_against_base has said so before
        module = match["module"].removeprefix("text_model.")
        if match["side"] == "up":
            tensor = tensor * module_scale(configs[match["part"]], module)
        name = f"{match['part']}.{module}"
        sides.setdefault(name, {})[match["side"] or "magnitude"] = tensor
    return {name: Product(**found) for name, found in sides.items()}


def from_peft(
    states: Mapping[str, Mapping[str, torch.Tensor]], shapes: Mapping[str, LoraShape]
) -> dict[str, Product]:
    """The products of parts by their states in PEFT's naming."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    names = {"A.weight": "down", "B.weight": "up", "magnitude_vector": "magnitude"}
    for part, state in states.items():
        config = shapes[part].peft()
        for key, tensor in state.items():
            path, _, kind = key.rpartition(".lora_")
            module = path.removeprefix("text_model.")
            if names[kind] == "up":
                tensor = tensor * module_scale(config, module)
            sides.setdefault(f"{part}.{module}", {})[names[kind]] = tensor
    return {name: Product(**found) for name, found in sides.items()}


def saved_products(products: Mapping[str, Product]) -> dict[str, torch.Tensor]:
    """Products by their keys in adapter files (tensor_file.py)."""
    return {
        f"{PREFIX}{name}.{side}": tensor
        for name, product in products.items()
        for side, tensor in vars(product).items()
        if tensor is not None
    }


def loaded_products(tensors: Mapping[str, torch.Tensor]) -> dict[str, Product]:
    """The products among an adapter file's tensors."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(PREFIX):
            name, _, side = key.removeprefix(PREFIX).rpartition(".")
            sides.setdefault(name, {})[side] = tensor
    return {name: Product(**found) for name, found in sides.items()}


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
    layers = {
        f"{part}.{name}": layer
        for part, model in parts_of(wearer).items()
        for name, layer in own_layers(model).items()
    }
    handles = [
        layers[name].register_forward_hook(_hook(layers[name], product, scale, mask))
        for name, product in products.items()
    ]

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    return take_off


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

    def apply(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the layer would say with this weight and no bias."""
        if tensor.dim() == 2:
            return functional.linear(x, tensor)
        return functional.conv2d(x, tensor, None, layer.stride, layer.padding, layer.dilation)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        hidden = mask(apply(down, x))
        change = functional.linear(hidden, up) if up.dim() == 2 else functional.conv2d(hidden, up)
        if gain is not None:
            change = gain * change + (gain - 1) * apply(layer.weight, x)
        return y + scale * change

    return hook
