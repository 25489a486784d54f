"""The loss all methods share: how far the denoiser's answer is from what it should be. Torch.

With x_t = a_t x_0 + s_t e (Ho et al. 2020, eq. 4), a_t^2 = alphas_cumprod[t], s_t^2 = 1 - a_t^2:

    target   epsilon: e          v: a_t e - s_t x_0   (Salimans & Ho 2022)
    SNR(t)   a_t^2 / s_t^2
    weight   epsilon: min(SNR, gamma) / SNR     v: min(SNR, gamma) / (SNR + 1)
                                                (min-SNR-gamma, Hang et al. 2023)
"""

from dataclasses import dataclass
from typing import Any

import torch

from lookalike_platform.errors import CapabilityMissing


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: [timesteps]; prediction_type: epsilon | v_prediction."""

    alphas_cumprod: torch.Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler.

        Raises CapabilityMissing for a prediction type other than epsilon and v_prediction.
        """
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise CapabilityMissing(f"training a base with prediction type {kind!r}")
        return cls(scheduler.alphas_cumprod.clone(), kind)

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def noised(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of latents x0 and noise e, [n, c, h, w], at timesteps t [n]."""
        a, s = self._scales(t)
        return a * x0 + s * e

    def target(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the denoiser should say about x_t."""
        if self.prediction_type == "epsilon":
            return e
        a, s = self._scales(t)
        return a * e - s * x0

    def weight(self, t: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """min-SNR-gamma weights [n] of the samples' squared errors; ones without a gamma."""
        if gamma is None:
            return torch.ones(len(t))
        alpha = self.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        clipped = snr.clamp(max=gamma)
        return clipped / (snr if self.prediction_type == "epsilon" else snr + 1)

    def _scales(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()


def weighted_mse(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """sum_i w_i mean((prediction_i - target_i)^2), a scalar; weight: [n].

    With weights 1/n it is the plain MSE. With prior preservation (Ruiz et al. 2023, eq. 2) the n
    instance samples weigh 1/n each and the m class samples lambda/m: one batch, one forward.
    Weighting comes before the reduction, so min-SNR acts on both terms alike.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (weight * error).sum()
