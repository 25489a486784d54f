"""The base as an image encoder: what its denoiser makes of a picture half way through. Torch.

A picture is noised a little, and the output of the UNet's middle block for the empty prompt, its
mean over places, is the picture's feature vector (the idea of Tang et al. 2023, DIFT). Most of such
a vector says "a picture at this timestep" and is common to all: so the vector of an empty picture
under the same noise is subtracted, which spreads the cosines from 0.87 to 0.88 to what is below.

The timestep is the one that told subjects apart best: 29 photos of the six DreamBench subjects that
docs/evaluation.md names, on the bundled base, mean cosine of two photos of one subject and of two,
and how often a pair of one subject is closer than a pair of two (AUC; chance is .5):

    timestep    1     50    100   200   300   400   500   600   750   900
    within    .789   .735  .684  .654  .654  .688  .703  .601  .579  .239
    between   .756   .694  .635  .601  .598  .630  .655  .537  .473  .130
    AUC       .634   .641  .635  .623  .625  .627  .599  .595  .617  .578

It is a weak judge (the pixels themselves reach .605): good enough to see that a subject is learned,
too weak to rank methods by small differences. An operator who wants that names CLIP and DINO.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from lookalike_datasets.features.cache import component_digest
from lookalike_datasets.features.latents import encode, square, to_pixels
from lookalike_platform.conditioning import predict
from lookalike_platform.errors import CapabilityMissing
from lookalike_platform.files import canonical_digest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.draws import generator
from lookalike_trainers.objective import NoiseSchedule

TIMESTEP = 50
"""Of a thousand."""
DRAWS = 4
_AT_ONCE = 16


class BaseFeatures:
    """Mean-pooled features of the UNet's middle block, averaged over DRAWS fixed noises.

    Raises CapabilityMissing for a base whose UNet has no middle block.
    """

    name = "base-features"

    def __init__(self, parts: BaseParts) -> None:
        if parts.unet.mid_block is None:
            raise CapabilityMissing(
                "the base's UNet has no middle block to take features from: name an encoder, "
                "LOOKALIKE_DINO_ENCODER or LOOKALIKE_CLIP_ENCODER"
            )
        self._parts = parts
        self._resolution = resolution(parts)
        self._schedule = NoiseSchedule.of(parts.scheduler)
        components = [component_digest(parts.folder / part) for part in ("unet", "vae")]
        self.digest = canonical_digest([self.name, components, TIMESTEP, DRAWS])

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        batches = [images[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE)]
        latents = [picture_latents(self._parts, batch) for batch in batches]
        features = torch.cat([self._features(batch) for batch in latents])
        return F.normalize(features - self._features(torch.zeros_like(latents[0][:1])), dim=1)

    @torch.inference_mode()
    def _features(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, channels of the middle block] of clean latents [n, c, h, w]."""
        unet, device = self._parts.unet, self._parts.device
        blank = self._parts.encode([""], self._resolution).expand(len(latents))
        place = self._schedule.timesteps * TIMESTEP // 1000
        timesteps = torch.full((len(latents),), place)
        told = self._schedule.times[timesteps].to(device)
        seen: list[torch.Tensor] = []
        hook = unet.mid_block.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output.mean((2, 3)).float().cpu())
        )
        try:
            for number in range(DRAWS):
                luck = generator("base features", number)
                noise = torch.randn(latents.shape[1:], generator=luck).expand_as(latents)
                noisy = self._schedule.noised(latents, noise, timesteps)
                predict(unet, noisy.to(device), told, blank)
        finally:
            hook.remove()
        return torch.stack(seen).mean(0).clone()


def resolution(parts: BaseParts) -> int:
    """Pixels of a side, as the base was trained."""
    return int(parts.unet.config.sample_size) * parts.vae_scale


def picture_latents(parts: BaseParts, images: Sequence[Image.Image]) -> torch.Tensor:
    """Scaled latents [n, c, h, w] of the middles of pictures: the means of the autoencoder's."""
    side = resolution(parts)
    pixels = torch.stack([to_pixels(square(image, side)) for image in images])
    mean, _ = encode(parts.vae, pixels)
    return mean * float(parts.vae.config.scaling_factor)
