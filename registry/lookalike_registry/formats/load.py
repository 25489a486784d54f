"""A foreign adapter, recognised by its keys and read as what our own files hold. Torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard
from lookalike_registry.formats.custom_diffusion import from_processors, is_processors
from lookalike_registry.formats.diffusers_lora import (
    from_diffusers,
    is_diffusers_lora,
    save_diffusers,
)
from lookalike_registry.formats.kohya import from_kohya, is_kohya
from lookalike_registry.formats.textual_inversion import (
    from_embeddings,
    is_embeddings,
    is_token,
)
from lookalike_registry.products import Product, saved_products
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import (
    ADAPTER_NAME,
    modelspec,
    parameter_shapes,
    save_tensors,
)


@dataclass(frozen=True)
class Loaded:
    """products: by `<part>.<module>`; tensors: by their keys in adapter files (tensor_file.py)."""

    method: Literal["lora", "textual_inversion", "custom_diffusion"]
    products: Mapping[str, Product] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def load(files: Sequence[Path], base_folder: Path) -> Loaded:
    """One adapter: a file of weights, a file with the rows of its word, or one of each.

    Raises InvalidRequest for what is no safetensors file of a known format or does not fit the
    base, with the keys.
    """
    from safetensors.torch import load_file

    products: dict[str, Product] = {}
    deltas: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    widths = _widths(base_folder)
    for path in files:
        read_header(path)  # refuses pickles and unsound files
        tensors = load_file(path)
        words = _is_word(tensors, widths)
        if rows if words else products or deltas:
            raise InvalidRequest(
                f"{path.name} is a second file of {'words' if words else 'weights'}: import one "
                "adapter at a time, and of one with several words the weights with one word each."
            )
        if words:
            rows = from_embeddings(tensors, widths, path.name)
        elif is_kohya(tensors):
            products = from_kohya(tensors, base_folder, path.name)
        elif is_diffusers_lora(tensors):
            products = from_diffusers(path)
        elif is_processors(tensors):
            deltas = from_processors(tensors, base_folder, path.name)
        else:
            raise _unknown(path.name, tensors)
    learned = {f"tokens.{part}": tensor for part, tensor in rows.items()}
    if deltas:
        return Loaded("custom_diffusion", tensors=deltas | learned)
    if products and learned:
        return Loaded("lora", tensors=saved_products(products) | learned)
    if products:
        return Loaded("lora", products=products)
    return Loaded("textual_inversion", tensors=learned)


def save(loaded: Loaded, folder: Path, card: LoraCard, class_noun: str) -> Path:
    """Write it as one of our files. card: its shapes are found here, and may be none.

    class_noun: where a learned word begins when the adapter acts at scale 0.
    """
    if loaded.products:
        path = folder / WEIGHTS_NAME
        save_diffusers(path, loaded.products, card)
        return path
    about: dict[str, dict[str, Any]] = {
        "lora": {},
        "textual_inversion": {"initializer": class_noun},
        "custom_diffusion": {"subjects": int(any(k.startswith("tokens.") for k in loaded.tensors))},
    }
    spec = modelspec(
        loaded.method,
        title=card.title,
        family=card.family,
        resolution=card.resolution,
        trigger=card.trigger,
        prediction_type=card.prediction_type,
    )
    path = folder / ADAPTER_NAME
    save_tensors(path, loaded.method, loaded.tensors, about[loaded.method], spec)
    return path


def _is_word(tensors: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> bool:
    known = is_kohya(tensors) or is_diffusers_lora(tensors) or is_processors(tensors)
    return is_embeddings(tensors) or (not known and is_token(tensors, widths))


def _widths(base_folder: Path) -> dict[str, int]:
    """Of the rows of each text encoder."""
    end = ".embeddings.token_embedding.weight"
    shapes = parameter_shapes(base_folder)
    return {key.removesuffix(end): shape[1] for key, shape in shapes.items() if key.endswith(end)}


def _unknown(filename: str, tensors: Mapping[str, torch.Tensor]) -> InvalidRequest:
    return InvalidRequest(
        f"{filename} is no adapter that is understood: LoRA in the layout of diffusers or kohya, "
        "learned embeddings, or Custom Diffusion's weights.",
        [FieldProblem(key, "is a key of no known format") for key in tensors],
    )
