"""LoRA in diffusers' layout: our own files, those without alpha, and those in PEFT's names. Torch.

unet.<module>.lora.down.weight, .up.weight              Stable Diffusion's pipelines
text_encoder.<module>.lora_linear_layer.down.weight     and text_encoder_2
unet.<module>.lora_A.weight, .lora_B.weight             PEFT's names, which loaders take too
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lookalike_platform.errors import CapabilityMissing
from lookalike_registry.adapter_file import KEY, PARTS, LoraCard, LoraShape, lora_modules, save_lora
from lookalike_registry.products import Product, read_lora
from lookalike_registry.safetensors_header import read_header

METADATA = "lora_adapter_metadata"
_PEFT = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}


def is_diffusers_lora(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(KEY.fullmatch(_renamed(key)) for key in tensors)


def from_diffusers(path: Path) -> dict[str, Product]:
    """The products of a file. Where it does not tell its alpha, that is the rank, as in diffusers.

    Raises InvalidRequest for keys that are no half of a pair, by name.
    """
    from safetensors.torch import load_file

    header = read_header(path)
    renamed = type(header)({_renamed(k): t for k, t in header.tensors.items()}, header.metadata)
    lora_modules(renamed, path.name)
    if METADATA in header.metadata and renamed.tensors == header.tensors:
        return read_lora(path)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        match = KEY.fullmatch(_renamed(key))
        assert match is not None  # lora_modules has refused the others
        if match["side"] is None:
            raise CapabilityMissing("DoRA from files that do not tell their alpha")
        name = f"{match['part']}.{match['module'].removeprefix('text_model.')}"
        sides.setdefault(name, {})[match["side"]] = tensor
    return {name: Product(**found) for name, found in sides.items()}


def save_diffusers(path: Path, products: Mapping[str, Product], card: LoraCard) -> None:
    """Write products as one of our LoRA files. card: its shapes are found here, and may be none."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, product in products.items():
        part, _, module = name.partition(".")
        state = states.setdefault(part, {})
        state[f"{module}.lora_A.weight"] = product.down
        state[f"{module}.lora_B.weight"] = product.up
        if product.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = product.magnitude
    shapes = {part: _shape(part, products) for part in PARTS if part in states}
    save_lora(path, states, replace(card, shapes=shapes))


def _shape(part: str, products: Mapping[str, Product]) -> LoraShape:
    """Every module by its whole name; scales are in the products, so that alpha is the rank."""
    own = {
        name.removeprefix(f"{part}."): product
        for name, product in products.items()
        if name.startswith(f"{part}.")
    }
    ranks = {module: len(product.down) for module, product in own.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return LoraShape(
        rank=usual,
        alpha=float(usual),
        targets=tuple(ranks),
        ranks={f"^{module}": rank for module, rank in ranks.items() if rank != usual},
        dora=any(product.magnitude is not None for product in own.values()),
    )


def _renamed(key: str) -> str:
    for theirs, ours in _PEFT.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key
