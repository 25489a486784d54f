"""Adapter files: a LoRA in the layout of diffusers, with metadata other programs understand.

    unet.<module>.lora.down.weight                 A  [rank, in]   or [rank, in, k, k]
    unet.<module>.lora.up.weight                   B  [out, rank]  or [out, rank, 1, 1]
    text_encoder.<module>.lora_linear_layer.down.weight, .up.weight

`lora_adapter_metadata` carries rank and alpha as a PEFT config: without it diffusers takes alpha
to be the rank. `modelspec.*` follows https://github.com/Stability-AI/ModelSpec 1.0.1.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.files import atomic_write, sha256_bytes
from lookalike_registry.safetensors_header import Header, Tensor, read_header, with_metadata

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
DTYPES = ("F32", "F16", "BF16")
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1/lora",
    ("sd2", "epsilon"): "stable-diffusion-v2-512/lora",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v/lora",
}
KEY = re.compile(
    r"(?P<part>unet|text_encoder)\.(?P<module>[\w.]+?)\.(lora|lora_linear_layer)"
    r"\.(?P<side>down|up)\.weight"
)


@dataclass(frozen=True)
class LoraShape:
    """One model's LoRA: W' = W + (alpha / rank) B A on modules whose names end in a target."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def peft(self) -> dict[str, Any]:
        """The keyword arguments of `peft.LoraConfig` that decide what the adapter computes."""
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return {"r": self.rank, "lora_alpha": alpha, "target_modules": sorted(self.targets)}


@dataclass(frozen=True)
class LoraCard:
    """What the file says about itself. `family`: sd1 | sd2; `resolution` in pixels."""

    title: str
    family: str
    resolution: int
    trigger: str
    prediction_type: str
    unet: LoraShape
    text_encoder: LoraShape | None = None


@dataclass(frozen=True)
class LoraModule:
    """The shapes one module's pair has in the file."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def save_lora(
    path: Path,
    unet_state: Mapping[str, "torch.Tensor"],
    text_encoder_state: Mapping[str, "torch.Tensor"] | None,
    card: LoraCard,
) -> str:
    """Writes the adapter file and returns its sha256. The same tensors give the same bytes.

    Args:
        unet_state, text_encoder_state: as `peft.get_peft_model_state_dict` gives them
            (`<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank]).

    Raises:
        InvalidRequest: a state is not a LoRA, or it and the card do not belong together.
    """
    from safetensors.torch import save

    if bool(text_encoder_state) != (card.text_encoder is not None):
        raise InvalidRequest("The card and the state must both have a text encoder, or neither.")
    states = {"unet": unet_state, "text_encoder": text_encoder_state or {}}
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
    """The file's LoRA pairs by `unet.<module>` or `text_encoder.<module>`.

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
            sides.setdefault(f"{match['part']}.{module}", {})[match["side"]] = tensor
    unknown += [
        FieldProblem(module, "has only one half of its pair")
        for module, pair in sides.items()
        if len(pair) != 2
    ]
    if unknown:
        raise InvalidRequest(f"{filename} holds tensors that cannot be used.", unknown)
    if not sides:
        raise InvalidRequest(f"{filename} holds no LoRA weights.")
    return {module: LoraModule(pair["down"], pair["up"]) for module, pair in sides.items()}


def peft_configs(header: Header, filename: str) -> dict[str, dict[str, Any]]:
    """The PEFT config of each part (`unet`, `text_encoder`), from `lora_adapter_metadata`.

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
            rank, alpha = config["r"], config["lora_alpha"]
            if not (isinstance(rank, int) and rank > 0 and 0 < float(alpha) < float("inf")):
                raise ValueError(f"rank {rank!r} and alpha {alpha!r}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{filename} does not say its rank and alpha (metadata lora_adapter_metadata: {error})."
            " Save it again with diffusers 0.35 or later, or with this project."
        ) from error
    return configs


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
        if (problem := _misfit(module, shapes.get(name), configs[name.partition(".")[0]]["r"]))
    ]
    if problems:
        raise InvalidRequest(
            f"{path.name} does not fit the base model in {base_folder.name}: it was trained on"
            " another one.",
            problems,
        )
    problems = [
        FieldProblem(key, "holds values that are not finite")
        for key, tensor in header.tensors.items()
        if not finite(path, tensor)
    ]
    if problems:
        raise InvalidRequest(f"{path.name} is damaged: its training diverged.", problems)
    return header


def _file_key(part: str, name: str) -> str:
    module, found, side = name.rpartition(".lora_")
    if not found or side not in ("A.weight", "B.weight"):
        raise InvalidRequest(f"{part}: {name} is not part of a LoRA in PEFT's naming.")
    layer = "lora" if part == "unet" else "lora_linear_layer"
    if part == "text_encoder" and not module.startswith("text_model."):
        # Transformers 5 dropped this prefix; diffusers adds or removes it as its model needs.
        module = f"text_model.{module}"
    return f"{part}.{module}.{layer}.{'down' if side == 'A.weight' else 'up'}.weight"


def _metadata(card: LoraCard, tensors_sha256: str) -> dict[str, str]:
    try:
        architecture = ARCHITECTURES[card.family, card.prediction_type]
    except KeyError:
        raise InvalidRequest(
            f"No file layout for family {card.family} with {card.prediction_type} prediction."
        ) from None
    parts = {"unet": card.unet, "text_encoder": card.text_encoder}
    config = {
        f"{part}.{name}": value
        for part, shape in parts.items()
        if shape is not None
        for name, value in shape.peft().items()
    }
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(config, sort_keys=True),
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


def base_shapes(base_folder: Path) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the base by `unet.<module>` and `text_encoder.<module>`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("unet", "text_encoder"):
        for file in sorted((base_folder / part).glob("*.safetensors")):
            for key, tensor in read_header(file).tensors.items():
                module = key.removeprefix("text_model.").removesuffix(".weight")
                shapes[f"{part}.{module}"] = tensor.shape
    if not shapes:
        raise InvalidRequest(f"{base_folder.name} holds no safetensors weights to check against.")
    return shapes


def _misfit(module: LoraModule, weight: tuple[int, ...] | None, rank: int) -> str | None:
    if weight is None or len(weight) not in (2, 4):
        return "is no layer of the base model"
    out, *rest = weight
    expected_down = (rank, *rest)
    expected_up = (out, rank, *(1 for _ in rest[1:]))
    if module.down.shape != expected_down:
        return f"down is {list(module.down.shape)}, the base needs {list(expected_down)}"
    if module.up.shape != expected_up:
        return f"up is {list(module.up.shape)}, the base needs {list(expected_up)}"
    return None


def finite(path: Path, tensor: Tensor) -> bool:
    """No infinity and no NaN: such values have all exponent bits set."""
    import numpy

    kind, exponent = {
        "F32": ("<u4", 0x7F800000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
    }[tensor.dtype]
    with path.open("rb") as file:
        file.seek(tensor.begin)
        bits = numpy.frombuffer(file.read(tensor.end - tensor.begin), dtype=kind)
    return not bool(((bits & exponent) == exponent).any())
