"""Products of thin matrices, the stuff of every kind of LoRA, in each of our files. Torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lookalike_registry.adapter_file import KEY, LoraShape, module_scale, peft_configs
from lookalike_registry.safetensors_header import read_header

PREFIX = "lora."


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
