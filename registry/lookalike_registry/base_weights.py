"""A base's weights as its files have them. Torch."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from lookalike_registry.adapter_file import PARTS


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
