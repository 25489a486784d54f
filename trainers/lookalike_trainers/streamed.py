"""Weights of a diffusers folder read one tensor at a time, into a model or as they are. Torch.

`from_pretrained` maps the whole file into memory and makes the smaller weights beside it; read one
by one, what is resident is the smaller weights and one tensor: for SD 1.5's UNet in bf16 1.7 GB
instead of 5.1, in each process.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lookalike_registry.adapter_file import PARTS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_streamed(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model of class `kind` in a folder, one file or shards; weights on the CPU.

    Raises RuntimeError, as `load_state_dict` does, if the files lack a weight or have one more.
    """
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder, local_files_only=True))
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(folder / WEIGHTS, "pt") as file:
            files = dict.fromkeys(file.keys(), WEIGHTS)
    # Opened anew for each tensor: closing it is what gives the mapped pages back.
    tensors = {name: _read(folder / files[name], name, dtype) for name in files}
    model.load_state_dict(tensors, assign=True)
    return model


def stored_weights(base_folder: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a base's weights that are named, by `<part>.<parameter>`, float32 on the CPU.

    No model is built for them, which takes patches of torch that only one thread may hold.
    """
    for part in PARTS:
        for path in sorted((base_folder / part).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = f"{part}.{key.removeprefix('text_model.')}"
                    if name in names:
                        yield name, file.get_tensor(key).float()


def _read(path: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(dtype, copy=True)
