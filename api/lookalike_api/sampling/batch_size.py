"""How many pixels of pictures a device makes at once. Imports torch."""

import torch

from lookalike_platform.device import device_of

# 16 pictures of 256 x 256, 4 of 512 x 512, or one of 1024 x 1024.
LEAST = 2**20
# On a GPU as many for every 8 GiB: beside the steps its memory holds two bases, the adapters, and
# what the autoencoder needs at the end.
BYTES = 2**33


def batch_pixels(device: str) -> int:
    """From the memory of the device that the settings name."""
    found = device_of(device)
    if found.type != "cuda":
        return LEAST
    # To the nearest: drivers keep some of it, and a card of 80 GiB says 79.1.
    return LEAST * max(1, round(torch.cuda.get_device_properties(found).total_memory / BYTES))
