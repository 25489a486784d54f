"""A base with an adapter's dense changes in its weights, as a diffusers folder of its own. Torch.

W' = W + dW, in float32 where anything was added, so that it paints what the adapter does.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lookalike_platform.errors import InvalidRequest
from lookalike_platform.files import atomic_write
from lookalike_registry.adapter_file import PARTS
from lookalike_registry.safetensors_header import read_header

_LEFT_OUT = ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.fp16.safetensors", ".*")
"""The base's weights in other formats, which would still be the base's."""


def save_model(deltas: Mapping[str, torch.Tensor], base_folder: Path, folder: Path) -> list[Path]:
    """Write the folder. deltas: by `delta.<part>.<parameter>`.

    Raises InvalidRequest if a delta is of no parameter of the base.
    """
    from safetensors.torch import load_file, save

    shutil.copytree(
        base_folder, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True
    )
    left = set(deltas)
    for part in PARTS:
        for file in sorted((folder / part).glob("*.safetensors")):
            changes = {
                key: f"delta.{part}.{key.removeprefix('text_model.')}"
                for key in read_header(file).tensors
            }
            changes = {key: name for key, name in changes.items() if name in deltas}
            if changes:
                tensors = load_file(file)
                for key, name in changes.items():
                    tensors[key] = tensors[key].float() + deltas[name].float()
                atomic_write(file, save(tensors, {"format": "pt"}))
                left -= set(changes.values())
    if left:
        raise InvalidRequest(f"The adapter changes what this base has not: {sorted(left)[0]}.")
    return sorted(path for path in folder.rglob("*") if path.is_file())
