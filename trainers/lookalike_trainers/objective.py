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
    prediction: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i w_i mean((prediction_i - target_i)^2), a scalar; weight: [n].

    With weights 1/n it is the plain MSE. With prior preservation (Ruiz et al. 2023, eq. 2) the n
    instance samples weigh 1/n each and the m class samples lambda/m: one batch, one forward.
    Weighting comes before the reduction, so min-SNR acts on both terms alike.

    With a mask [n, 1, h, w] the mean is over what it shows: sum(m e) / sum(m) of each sample
    (Kumari et al. 2023); a sample of which it shows nothing has no error.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return (weight * error.flatten(1).mean(1)).sum()
    shown = mask.expand_as(error).flatten(1)
    return (weight * (shown * error.flatten(1)).sum(1) / shown.sum(1).clamp(min=1e-6)).sum()
