"""Custom Diffusion as diffusers' own script writes it. Torch.

    <attention>.processor.to_k_custom_diffusion.weight, to_v_…   [out, in] the whole new W
    <self-attention>.processor                                    [0] nothing to change

and one file a token, `<token>.safetensors` {"<token>": [1, d]}. The empty tensors are there
for diffusers' loader: it wants every attention layer named, though its writer leaves them out.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.base_weights import stored_weights
from lookalike_registry.tensor_file import parameter_shapes

NAME = "custom_diffusion"
WEIGHTS_NAME = "pytorch_custom_diffusion_weights.safetensors"
KEY = re.compile(r"(?P<attention>[\w.]+)\.processor\.(?P<side>to_k|to_v)_custom_diffusion\.weight")
DELTA = re.compile(r"delta\.unet\.(?P<attention>[\w.]+attn2)\.(?P<side>to_k|to_v)\.weight")
EMPTY = ".processor"


def to_processors(deltas: Mapping[str, torch.Tensor], base_folder: Path) -> dict[str, torch.Tensor]:
    """The base's weights plus `delta.unet.….attn2.to_k.weight` and to_v, by processor."""
    base = _projections(base_folder)
    tensors = {}
    for key, delta in deltas.items():
        match = DELTA.fullmatch(key)
        assert match is not None, key  # the method saves no other
        own = base[f"{match['attention']}.{match['side']}.weight"]
        name = f"{match['attention']}.processor.{match['side']}_custom_diffusion.weight"
        tensors[name] = own + delta.float()
    attentions = {
        key.removesuffix(".to_k.weight") for key in base if key.endswith("attn1.to_k.weight")
    }
    return tensors | {f"{name}{EMPTY}": torch.zeros(0) for name in attentions}


def is_processors(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(KEY.fullmatch(key) for key in tensors)


def from_processors(
    tensors: Mapping[str, torch.Tensor], base_folder: Path, filename: str
) -> dict[str, torch.Tensor]:
    """`delta.unet.….attn2.to_k.weight` and to_v: what the file has over the base.

    Raises InvalidRequest for keys that are none of this format or no layer of the base, by name.
    """
    base = _projections(base_folder)
    deltas, problems = {}, []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None and key.endswith(EMPTY) and not tensor.numel():
            continue
        if match is None:
            problems.append(FieldProblem(key, "is not a key of a Custom Diffusion file"))
            continue
        name = f"{match['attention']}.{match['side']}.weight"
        own = base.get(name)
        if not match["attention"].endswith("attn2"):
            message = "changes self-attention, and Custom Diffusion changes attn2 alone"
            problems.append(FieldProblem(key, message))
        elif own is None or own.shape != tensor.shape:
            problems.append(FieldProblem(key, "is no layer of the base model, or of another shape"))
        else:
            deltas[f"delta.unet.{name}"] = tensor.float() - own
    if problems:
        raise InvalidRequest(f"{filename} holds tensors that cannot be used.", problems)
    return deltas


def _projections(base_folder: Path) -> dict[str, torch.Tensor]:
    """What the base's attention makes keys and values with, by name in the UNet."""
    sides = (".to_k.weight", ".to_v.weight")
    names = {
        n for n in parameter_shapes(base_folder) if n.startswith("unet.") and n.endswith(sides)
    }
    stored = stored_weights(base_folder, names)
    return {name.removeprefix("unet."): weight for name, weight in stored}
