"""Adapter files of every method but plain LoRA: `adapter.safetensors`. Torch-free but for saving.

    delta.<part>.<parameter>      added to the base's parameter, and of its shape
    spectrum.<part>.<parameter>   [min(out, in)] added to its matrix's singular values
    lora.<part>.<module>.down     A [rank, in] or [rank, in, k, k]
    lora.<part>.<module>.up       B [out, rank] or [out, rank, 1, 1], added to W as B A
    lora.<part>.<module>.magnitude   [out] or [1, out, 1, 1], the length of W + B A's rows (DoRA)
    tokens.<part>                 [count, width] rows of learned words; of several subjects, one
                                  after the other (config `subjects`; see nth_word)
    <method>.<anything>           what a method alone understands, and checks when it is worn

A part is unet, text_encoder or text_encoder_2. Metadata: `lookalike.method`, `lookalike.config`
(JSON: what the method needs to be worn), and `modelspec.*` as in LoRA files.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.files import atomic_write
from lookalike_registry.adapter_file import ARCHITECTURES, DTYPES, PARTS, TABLE
from lookalike_registry.refusals import refuse_misfits, refuse_what_is_not_finite
from lookalike_registry.safetensors_header import Header, Tensor, read_header, with_metadata

if TYPE_CHECKING:
    import torch

ADAPTER_NAME = "adapter.safetensors"
METHOD_KEY = "lookalike.method"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says about itself. config: as its method saved it."""

    method: str
    config: dict[str, Any]


def save_tensors(
    path: Path,
    method: str,
    tensors: Mapping[str, "torch.Tensor"],
    config: Mapping[str, Any],
    modelspec: Mapping[str, str],
) -> None:
    """Write the file; the same tensors and config give the same bytes."""
    from safetensors.torch import save

    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
    metadata = {
        "format": "pt",
        METHOD_KEY: method,
        "lookalike.config": json.dumps(config, sort_keys=True),
        **{f"modelspec.{key}": value for key, value in modelspec.items()},
    }
    atomic_write(path, with_metadata(save(plain), metadata))


def modelspec(
    method: str, *, title: str, family: str, resolution: int, trigger: str, prediction_type: str
) -> dict[str, str]:
    """The fields of ModelSpec 1.0.1, as `save_tensors` takes them."""
    lora = ARCHITECTURES[family, prediction_type]
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{lora.removesuffix('/lora')}/{method.replace('_', '-')}",
        "implementation": "lookalike",
        "title": title,
        "resolution": f"{resolution}x{resolution}",
        "trigger_phrase": trigger,
        "prediction_type": {"v_prediction": "v"}.get(prediction_type, prediction_type),
    }


def nth_word(word: str, number: int) -> str:
    """What the subject of this number, from 1, answers to: sks, sks-2, sks-3, …"""
    return word if number == 1 else f"{word}-{number}"


def adapter_info(header: Header, filename: str) -> AdapterInfo:
    """Raises InvalidRequest if the file does not say what it is."""
    try:
        method = header.metadata[METHOD_KEY]
        config = json.loads(header.metadata["lookalike.config"])
    except (KeyError, ValueError) as error:
        raise InvalidRequest(
            f"{filename} does not say which method made it (metadata lookalike.method and "
            f"lookalike.config: {error}). Import files of other programs instead."
        ) from error
    return AdapterInfo(method, config)


def check_tensors(path: Path, base_folder: Path) -> Header:
    """Check that every tensor of the file belongs to a parameter of the base and is finite.

    Raises:
        InvalidRequest: what does not fit, one field per tensor.
    """
    header = read_header(path)
    method = adapter_info(header, path.name).method
    shapes = parameter_shapes(base_folder)
    problems = [
        FieldProblem(key, problem)
        for key, tensor in header.tensors.items()
        if (problem := _misfit(key, tensor, header, shapes, method))
    ]
    refuse_misfits(path, base_folder, problems)
    refuse_what_is_not_finite(path, header)
    return header


def parameter_shapes(base_folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's parameters by `<part>.<parameter>`.

    Text encoders' names are without the `text_model.` that transformers 5 dropped.
    """
    return {
        f"{part}.{key.removeprefix('text_model.')}": tensor.shape
        for part in PARTS
        for file in sorted((base_folder / part).glob("*.safetensors"))
        for key, tensor in read_header(file).tensors.items()
    }


def _misfit(
    key: str, tensor: Tensor, header: Header, shapes: dict[str, tuple[int, ...]], method: str
) -> str | None:
    kind, _, name = key.partition(".")
    if tensor.dtype not in DTYPES:
        return f"is {tensor.dtype}; allowed: {', '.join(DTYPES)}"
    match kind:
        case "delta":
            return _differs(tensor, shapes.get(name))
        case "spectrum":
            shape = shapes.get(name)
            rank = shape and (min(shape[0], math.prod(shape[1:])),)
            return _differs(tensor, rank)
        case "lora":
            return _lora_misfit(name, tensor, header, shapes)
        case "tokens":
            table = shapes.get(f"{name}.embeddings.token_embedding.weight")
            return _differs(tensor, table and (tensor.shape[0], table[1]))
        case _ if kind == method:
            return None
    return f"is not a key of an adapter file of {method}"


def _lora_misfit(
    name: str, tensor: Tensor, header: Header, shapes: dict[str, tuple[int, ...]]
) -> str | None:
    module, _, side = name.rpartition(".")
    shape = shapes.get(f"{module}.weight")
    other = header.tensors.get(f"lora.{module}.{'up' if side == 'down' else 'down'}")
    if side not in ("up", "down", "magnitude") or other is None:
        return "has only one half of its pair"
    if shape is None or module.endswith(TABLE):
        return "is no layer of the base model"
    if side == "magnitude":
        return _differs(tensor, shape[:1] if len(shape) == 2 else (1, shape[0], 1, 1))
    rank = tensor.shape[0] if side == "down" else tensor.shape[1]
    if rank != (other.shape[1] if side == "down" else other.shape[0]):
        return "has another rank than its other half"
    ones = (1,) * (len(shape) - 2)
    return _differs(tensor, (rank, *shape[1:]) if side == "down" else (shape[0], rank, *ones))


def _differs(tensor: Tensor, wanted: tuple[int, ...] | None) -> str | None:
    if wanted is None:
        return "is no parameter of the base model"
    if tensor.shape != wanted:
        return f"is {list(tensor.shape)}, the base needs {list(wanted)}"
    return None
