"""LoRA as kohya's scripts spell it, which A1111 and ComfyUI load. Torch.

    lora_unet_<module, dots as underscores>.lora_down.weight   A [rank, in] or [rank, in, k, k]
    lora_unet_<…>.lora_up.weight                               B [out, rank] or [out, rank, 1, 1]
    lora_unet_<…>.alpha                                        W' = W + (alpha / rank) B A
    lora_unet_<…>.dora_scale                                   m [out, 1] or [out, 1, 1, 1], read as
                                                               LyCORIS trains it: the rows' lengths
    lora_te_text_model_<…>                                     lora_te1_, lora_te2_ for SDXL, whose
                                                               lora_te2_text_projection is outside

Underscores are in names too, so a name is only read back by knowing the base's modules. kohya names
SDXL's UNet as its first publication did (`input_blocks_4_1_…`): both ways are read, and the names
of diffusers are written, which all three programs take, but for SDXL's add_embedding.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from lookalike_platform.errors import CapabilityMissing, FieldProblem, InvalidRequest
from lookalike_registry.adapter_file import base_shapes
from lookalike_registry.products import Product

KEY = re.compile(
    r"(?P<name>lora_(unet|te|te1|te2)_\w+)\."
    r"(?P<side>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_PUBLISHED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Of these A1111 and diffusers know no other name."""


def to_kohya(products: Mapping[str, Product], base_folder: Path) -> dict[str, torch.Tensor]:
    """Products by `<part>.<module>`, spelled.

    Raises CapabilityMissing for DoRA: with the same file ComfyUI divides by the lengths of the
    base's rows, A1111 by those of columns, and diffusers leaves the lengths out.
    One alpha for all: diffusers loses those of single modules, by looking for them under the names
    of old files. So B makes up for modules of another rank.
    """
    two = (base_folder / "text_encoder_2").is_dir()
    alpha = Counter(len(product.down) for product in products.values()).most_common(1)[0][0]
    tensors = {}
    for name, product in products.items():
        if product.magnitude is not None:
            raise CapabilityMissing(
                "DoRA for A1111 and ComfyUI, which compute another one from it: export it as "
                "diffusers, or train without dora"
            )
        spelled = _spelled(name, two)
        tensors[f"{spelled}.lora_down.weight"] = product.down
        tensors[f"{spelled}.lora_up.weight"] = product.up * (len(product.down) / alpha)
        tensors[f"{spelled}.alpha"] = torch.tensor(float(alpha))
    return tensors


def is_kohya(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(KEY.fullmatch(key) for key in tensors)


def from_kohya(
    tensors: Mapping[str, torch.Tensor], base_folder: Path, filename: str
) -> dict[str, Product]:
    """The products of a file, by `<part>.<module>` of the base.

    Raises InvalidRequest for keys that are none of this format or no layer of the base, by name.
    """
    known = spellings(base_folder)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            problems.append(FieldProblem(key, "is not a key of a LoRA file as kohya writes it"))
        elif match["name"] not in known:
            problems.append(FieldProblem(key, "is no layer of the base model"))
        else:
            sides.setdefault(known[match["name"]], {})[match["side"].split(".")[0]] = tensor
    problems += [
        FieldProblem(name, "has only one half of its pair")
        for name, found in sides.items()
        if not {"lora_down", "lora_up"} <= found.keys()
    ]
    problems += [
        FieldProblem(
            name, "its dora_scale is not of the rows' lengths, [out, 1]: save it with wd_on_out"
        )
        for name, found in sides.items()
        if {"lora_up", "dora_scale"} <= found.keys() and not _of_rows(found)
    ]
    dora = {name.partition(".")[0] for name, found in sides.items() if "dora_scale" in found}
    problems += [
        FieldProblem(name, "has no dora_scale, and other layers of its part have")
        for name, found in sides.items()
        if name.partition(".")[0] in dora and "dora_scale" not in found
    ]
    if problems:
        raise InvalidRequest(f"{filename} holds tensors that cannot be used.", problems)
    return {name: _product(found) for name, found in sides.items()}


def _product(found: Mapping[str, torch.Tensor]) -> Product:
    """With the scale in B. Without an alpha it is the rank, as in kohya's loader."""
    down, up = found["lora_down"], found["lora_up"]
    rank = len(down)
    scale = float(found["alpha"]) / rank if "alpha" in found else 1.0
    lengths = found.get("dora_scale")
    if lengths is not None:
        # As PEFT has them: [out], of a convolution [1, out, 1, 1].
        lengths = lengths.flatten() if down.dim() == 2 else lengths.reshape(1, -1, 1, 1)
    return Product(down, up if scale == 1 else up.float() * scale, lengths)


def _of_rows(found: Mapping[str, torch.Tensor]) -> bool:
    out, lengths = len(found["lora_up"]), found["dora_scale"]
    return lengths.shape == (out, *(1,) * (found["lora_up"].dim() - 1))


def spellings(base_folder: Path) -> dict[str, str]:
    """Every name that files give to a layer of the base → its `<part>.<module>`."""
    two = (base_folder / "text_encoder_2").is_dir()
    shapes = base_shapes(base_folder)
    layers = [name for name, shape in shapes.items() if len(shape) in (2, 4)]
    known = {_spelled(name, two): name for name in layers}
    if "text_encoder_2.text_projection" in layers:  # as our own exports had it once
        known["lora_te2_text_model_text_projection"] = "text_encoder_2.text_projection"
    config = json.loads((base_folder / "unet" / "config.json").read_text())
    for name in layers:
        part, _, module = name.partition(".")
        if part == "unet":
            known.setdefault(_as_published(module, config["layers_per_block"]), name)
    return known


def _spelled(name: str, two_encoders: bool) -> str:
    part, _, module = name.partition(".")
    if part == "unet":
        return f"lora_unet_{_PUBLISHED.get(module, module).replace('.', '_')}"
    number = ("2" if part.endswith("_2") else "1") if two_encoders else ""
    inner = module if module == "text_projection" else f"text_model.{module}"
    return f"lora_te{number}_{inner.replace('.', '_')}"


def _as_published(module: str, layers: int) -> str:
    """The module's name in the UNet as Stability AI published it, spelled.

    Its down blocks are one row of input_blocks: a convolution at 0, then each block's layers and
    its downsampler; its up blocks one row of output_blocks, with the upsampler in the last layer.
    """
    each = layers + 1
    place = re.match(
        r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)|mid_block\.(\w+)\.(\d)\.(.+)", module
    )
    if place is None:
        return f"lora_unet_{module.replace('.', '_')}"
    side, block, kind, layer, rest, mid_kind, mid_place, mid_rest = place.groups()
    if side is None:
        row = 1 if mid_kind == "attentions" else 2 * int(mid_place)
        published = f"middle_block.{row}.{_RESNET.get(mid_rest, mid_rest)}"
    elif kind == "downsamplers":
        published = f"input_blocks.{(int(block) + 1) * each}.0.op"
    elif kind == "upsamplers":
        published = f"output_blocks.{int(block) * each + layers}.2.{rest}"
    else:
        row = int(block) * each + int(layer)
        column = 0 if kind == "resnets" else 1
        rows = f"input_blocks.{row + 1}" if side == "down_blocks" else f"output_blocks.{row}"
        published = f"{rows}.{column}.{_RESNET.get(rest, rest) if column == 0 else rest}"
    return f"lora_unet_{published.replace('.', '_')}"
