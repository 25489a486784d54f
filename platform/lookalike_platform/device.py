"""The device that the settings name. Imports torch."""

import torch


def device_of(name: str) -> torch.device:
    """auto: the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
