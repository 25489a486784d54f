"""The picture that a generation starts from, from its file to its latents. Imports torch."""

from typing import Any

import numpy
import torch

from lookalike_api.sampling.fitting import fitted
from lookalike_api.sampling.messages import SampleOrder
from lookalike_platform.diffusion import encode_picture
from lookalike_platform.walk import Start


def start_of(order: SampleOrder, vae: Any, generators: list[torch.Generator]) -> Start | None:
    """The latents of the order's picture, one draw for each generator, and the mask in their size.

    What sticks out of the order's proportions is cut off. A latent is painted if the first pixel
    it stands for is at least half white, as diffusers has it.
    """
    if order.init_image is None or order.strength is None:
        return None
    size = (order.width, order.height)
    latents = encode_picture(vae, fitted(order.init_image, "RGB", size), generators)
    if order.mask_image is None:
        return Start(latents, order.strength)
    pixels = numpy.array(fitted(order.mask_image, "L", size), numpy.float32) / 255
    painted = torch.from_numpy(pixels >= 0.5).float()[None, None]
    mask = torch.nn.functional.interpolate(painted, size=latents.shape[-2:])
    return Start(latents, order.strength, mask)
