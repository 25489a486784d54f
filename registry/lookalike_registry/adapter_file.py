"""Adapter files: a LoRA in the layout of diffusers, with metadata other programs understand.

    unet.<module>.lora.down.weight                 A  [rank, in]   or [rank, in, k, k]
    unet.<module>.lora.up.weight                   B  [out, rank]  or [out, rank, 1, 1]
    text_encoder.<module>.lora_linear_layer.down.weight, .up.weight, text_encoder_2 likewise
    unet.<module>.lora_magnitude_vector            m  [out]        or [1, out, 1, 1], DoRA's
    text_encoder.<module>.lora_magnitude_vector.weight

`lora_adapter_metadata` carries rank and alpha as a PEFT config, modules of other ranks, rsLoRA and
DoRA: without it diffusers takes alpha to be the rank. `modelspec.*` follows
https://github.com/Stability-AI/ModelSpec 1.0.1.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.files import atomic_write, sha256_bytes
from lookalike_registry.refusals import refuse_misfits, refuse_what_is_not_finite
from lookalike_registry.safetensors_header import Header, Tensor, read_header, with_metadata

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
DTYPES = ("F32", "F16", "BF16")
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1/lora",
    ("sd1", "flow_prediction"): "stable-diffusion-v1/lora",
    ("sd2", "epsilon"): "stable-diffusion-v2-512/lora",
    ("sd2", "flow_prediction"): "stable-diffusion-v2-512/lora",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v/lora",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base/lora",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base/lora",
    ("sdxl", "flow_prediction"): "stable-diffusion-xl-v1-base/lora",
}
PARTS = ("unet", "text_encoder", "text_encoder_2")
KEY = re.compile(
    r"(?P<part>unet|text_encoder|text_encoder_2)\.(?P<module>[\w.]+?)\."
    r"((lora|lora_linear_layer)\.(?P<side>down|up)\.weight|lora_magnitude_vector(\.weight)?)"
)
PLAIN_PATTERN = re.compile(r"\^?[\w.]+")
"""A module's whole name after ^, or how it ends: no other regular expression of PEFT's."""


@dataclass(frozen=True)
class LoraShape:
    """One model's LoRA: W' = W + s B A on modules whose names end in a target.

    s = alpha / rank, or with rslora alpha / sqrt(rank) (Kalajdzievski 2023). With dora W' is also
    given the length m of its rows, which is learned (Liu et al. 2024).

    ranks: how a module's name ends → its rank; its alpha is to it as alpha is to rank.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    def peft(self) -> dict[str, Any]:
        """The keyword arguments of `peft.LoraConfig` that decide what the adapter computes."""
        config: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": _number(self.alpha),
            "target_modules": sorted(self.targets),
        }
        if self.ranks:
            config["rank_pattern"] = dict(self.ranks)
            config["alpha_pattern"] = {
                module: _number(self.alpha * rank / self.rank)
                for module, rank in self.ranks.items()
            }
        if self.rslora:
            config["use_rslora"] = True
        if self.dora:
            config["use_dora"] = True
        return config


@dataclass(frozen=True)
class LoraCard:
    """What the file says about itself. `family`: sd1 | sd2 | sdxl; `resolution` in pixels.

    shapes: by part (unet, text_encoder, text_encoder_2), those that have a LoRA.
    """

    title: str
    family: str
    resolution: int
    trigger: str
    prediction_type: str
    shapes: Mapping[str, LoraShape]


@dataclass(frozen=True)
class LoraModule:
    """The shapes one module's pair has in the file, and DoRA's magnitude."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def save_lora(
    path: Path, states: Mapping[str, Mapping[str, "torch.Tensor"]], card: LoraCard
) -> str:
    """Writes the adapter file and returns its sha256. The same tensors give the same bytes.

    Args:
        states: by part, as `peft.get_peft_model_state_dict` gives them
            (`<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank]).

    Raises:
        InvalidRequest: a state is not a LoRA, or states and card are not of the same parts.
    """
    from safetensors.torch import save

    if set(states) != set(card.shapes) or not set(states) <= set(PARTS):
        raise InvalidRequest(f"The card is of {sorted(card.shapes)}, states {sorted(states)}.")
    tensors = {
        _file_key(part, name): tensor.detach().cpu().contiguous()
        for part, state in states.items()
        for name, tensor in state.items()
    }
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    data = with_metadata(data, _metadata(card, hashlib.sha256(data[8 + length :]).hexdigest()))
    atomic_write(path, data)
    return sha256_bytes(data)


def lora_modules(header: Header, filename: str) -> dict[str, LoraModule]:
    """The file's LoRA pairs by `<part>.<module>`.

    Raises:
        InvalidRequest: keys that are no half of a LoRA pair, with their names in `fields`.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    unknown: list[FieldProblem] = []
    for key, tensor in header.tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            unknown.append(FieldProblem(key, "is not a key of a LoRA file in diffusers' layout"))
        elif tensor.dtype not in DTYPES:
            unknown.append(FieldProblem(key, f"is {tensor.dtype}; allowed: {', '.join(DTYPES)}"))
        else:
            # Older files of text encoders say text_model.encoder, newer models encoder.
            module = match["module"].removeprefix("text_model.")
            side = match["side"] or "magnitude"
            sides.setdefault(f"{match['part']}.{module}", {})[side] = tensor
    unknown += [
        FieldProblem(module, "has only one half of its pair")
        for module, found in sides.items()
        if not {"down", "up"} <= found.keys()
    ]
    if unknown:
        raise InvalidRequest(f"{filename} holds tensors that cannot be used.", unknown)
    if not sides:
        raise InvalidRequest(f"{filename} holds no LoRA weights.")
    return {
        module: LoraModule(found["down"], found["up"], found.get("magnitude"))
        for module, found in sides.items()
    }


def peft_configs(header: Header, filename: str) -> dict[str, dict[str, Any]]:
    """The PEFT config of each part (`unet`, …), from `lora_adapter_metadata`.

    Raises:
        InvalidRequest: a part with tensors has no sound config, so that its alpha is unknown.
    """
    parts = {key.partition(".")[0] for key in header.tensors}
    configs: dict[str, dict[str, Any]] = {part: {} for part in parts}
    try:
        flat = json.loads(header.metadata["lora_adapter_metadata"])
        for key, value in flat.items():
            part, _, name = key.partition(".")
            configs.setdefault(part, {})[name] = value
        for config in configs.values():
            ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            for rank in (config["r"], *ranks.values()):
                if not (isinstance(rank, int) and rank > 0):
                    raise ValueError(f"rank {rank!r}")
            for alpha in (config["lora_alpha"], *alphas.values()):
                if not 0 < float(alpha) < float("inf"):
                    raise ValueError(f"alpha {alpha!r}")
            for pattern in (*ranks, *alphas):
                if not PLAIN_PATTERN.fullmatch(pattern):
                    raise ValueError(f"pattern {pattern!r}, which is no module's name or its end")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{filename} does not say its rank and alpha (metadata lora_adapter_metadata: {error})."
            " Save it again with diffusers 0.35 or later, or with this project."
        ) from error
    return configs


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank a part's PEFT config (`peft_configs`) gives a module."""
    return int(_of_module(config.get("rank_pattern"), module, config["r"]))


def module_alpha(config: Mapping[str, Any], module: str) -> float:
    return float(_of_module(config.get("alpha_pattern"), module, config["lora_alpha"]))


def module_scale(config: Mapping[str, Any], module: str) -> float:
    """The s of W' = W + s B A."""
    rank = module_rank(config, module)
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_against_base(path: Path, base_folder: Path) -> Header:
    """Checks that the adapter in `path` fits the base and could be loaded. Imports no torch.

    Every module must exist in the base with the shapes the pair needs, ranks must be those of the
    metadata, and all values must be finite.

    Raises:
        InvalidRequest: what does not fit, one field per tensor or module.
    """
    header = read_header(path)
    modules = lora_modules(header, path.name)
    configs = peft_configs(header, path.name)
    shapes = base_shapes(base_folder)
    problems = [
        FieldProblem(name, problem)
        for name, module in modules.items()
        if (problem := _misfit(name, module, shapes.get(name), configs))
    ]
    refuse_misfits(path, base_folder, problems)
    refuse_what_is_not_finite(path, header)
    return header


def _file_key(part: str, name: str) -> str:
    module, found, side = name.rpartition(".lora_")
    layer = "lora" if part == "unet" else "lora_linear_layer"
    names = {
        "A.weight": f"{layer}.down.weight",
        "B.weight": f"{layer}.up.weight",
        # Transformers 5 looks for the name in its models, PEFT takes either.
        "magnitude_vector": "lora_magnitude_vector" + ("" if part == "unet" else ".weight"),
    }
    if not found or side not in names:
        raise InvalidRequest(f"{part}: {name} is not part of a LoRA in PEFT's naming.")
    if part != "unet" and not module.startswith("text_model."):
        # Transformers 5 dropped this prefix; diffusers adds or removes it as its model needs.
        module = f"text_model.{module}"
    return f"{part}.{module}.{names[side]}"


def _number(value: float) -> float:
    """Whole numbers as integers, as other programs write alpha."""
    return int(value) if float(value).is_integer() else value


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or its end, as PEFT takes it."""
    for pattern, value in (patterns or {}).items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return default


def _metadata(card: LoraCard, tensors_sha256: str) -> dict[str, str]:
    try:
        architecture = ARCHITECTURES[card.family, card.prediction_type]
    except KeyError:
        raise InvalidRequest(
            f"No file layout for family {card.family} with {card.prediction_type} prediction."
        ) from None
    config = {
        f"{part}.{name}": value
        for part, shape in card.shapes.items()
        for name, value in shape.peft().items()
    }
    return {
        "format": "pt",
        # Patterns stay in order: of those that fit a module the first counts.
        "lora_adapter_metadata": json.dumps(dict(sorted(config.items()))),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": card.title,
        "modelspec.resolution": f"{card.resolution}x{card.resolution}",
        "modelspec.trigger_phrase": card.trigger,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(
            card.prediction_type, card.prediction_type
        ),
        "modelspec.hash_sha256": f"0x{tensors_sha256}",
    }


TABLE = "_embedding"
"""How the names of tables end, which are looked up and multiply nothing: no product acts there."""


def base_shapes(base_folder: Path) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the base by `<part>.<module>`, without tables of rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        for file in sorted((base_folder / part).glob("*.safetensors")):
            for key, tensor in read_header(file).tensors.items():
                module = key.removeprefix("text_model.").removesuffix(".weight")
                if not module.endswith(TABLE):
                    shapes[f"{part}.{module}"] = tensor.shape
    if not shapes:
        raise InvalidRequest(f"{base_folder.name} holds no safetensors weights to check against.")
    return shapes


def _misfit(
    name: str,
    module: LoraModule,
    weight: tuple[int, ...] | None,
    configs: Mapping[str, Mapping[str, Any]],
) -> str | None:
    if weight is None or len(weight) not in (2, 4):
        return "is no layer of the base model"
    part, _, path = name.partition(".")
    rank = module_rank(configs[part], path)
    out, *rest = weight
    kernel = tuple(1 for _ in rest[1:])
    needed = {"down": (rank, *rest), "up": (out, rank, *kernel)}
    if configs[part].get("use_dora"):
        needed["magnitude"] = (1, out, *kernel) if kernel else (out,)
    for side in ("down", "up", "magnitude"):
        found: Tensor | None = getattr(module, side)
        shape = None if found is None else found.shape
        if shape != needed.get(side):
            return f"{side} is {_list(shape)}, the base needs {_list(needed.get(side))}"
    return None


def _list(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
