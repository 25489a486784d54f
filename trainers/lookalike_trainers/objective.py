"""The loss all methods share: how far the denoiser's answer is from what it should be. Torch.

With x_t = a_t x_0 + s_t e, what is called for is the base's own (its scheduler says which):

               a_t                    s_t           target
    epsilon    sqrt(alphas_cumprod)   sqrt(1 - a^2)  e              (Ho et al. 2020, eq. 4)
    v          the same               the same       a_t e - s_t x_0  (Salimans & Ho 2022)
    flow       1 - sigma              sigma          e - x_0        (Lipman et al. 2023)

An error of the target is one of x_0 times a_t / s_t, 1 / s_t and 1 / s_t. So min-SNR-gamma (Hang et
al. 2023), which weighs errors of x_0 by min(SNR, gamma), SNR = a_t^2 / s_t^2, weighs those of the
target by min(SNR, gamma) / SNR for epsilon, and by min(SNR, gamma) s_t^2 for v and flow.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lookalike_platform.errors import CapabilityMissing


@dataclass(frozen=True)
class NoiseSchedule:
    """signal, noise: a and s, [timesteps]; times: what the denoiser is told of each, [timesteps].

    prediction_type: epsilon | v_prediction | flow_prediction.
    """

    signal: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler.

        Raises CapabilityMissing for a prediction type other than those three.
        """
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            return cls.flow(scheduler.sigmas[: len(scheduler.timesteps)].flip(0))
        return cls.diffusion(scheduler.alphas_cumprod.clone(), scheduler.config.prediction_type)

    @classmethod
    def diffusion(cls, alphas_cumprod: torch.Tensor, prediction_type: str) -> "NoiseSchedule":
        if prediction_type not in ("epsilon", "v_prediction"):
            raise CapabilityMissing(f"training a base with prediction type {prediction_type!r}")
        times = torch.arange(len(alphas_cumprod))
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), times, prediction_type)

    @classmethod
    def flow(cls, sigmas: torch.Tensor) -> "NoiseSchedule":
        """sigmas: rising to 1, [timesteps]; the denoiser is told them in steps of the last."""
        return cls(1 - sigmas, sigmas, sigmas * len(sigmas), "flow_prediction")

    @property
    def timesteps(self) -> int:
        return len(self.times)

    def noised(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t of latents x0 and noise e, [n, c, h, w], at timesteps number t [n]."""
        a, s = self._scales(t)
        return a * x0 + s * e

    def target(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the denoiser should say about x_t."""
        if self.prediction_type == "epsilon":
            return e
        if self.prediction_type == "flow_prediction":
            return e - x0
        a, s = self._scales(t)
        return a * e - s * x0

    def weight(self, t: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """min-SNR-gamma weights [n] of the samples' squared errors; ones without a gamma."""
        if gamma is None:
            return torch.ones(len(t))
        snr = (self.signal[t] / self.noise[t]) ** 2
        clipped = snr.clamp(max=gamma)
        return clipped / snr if self.prediction_type == "epsilon" else clipped * self.noise[t] ** 2

    def _scales(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)


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
    error = (at_least_float32(prediction) - at_least_float32(target)).square()
    if mask is None:
        return (weight * error.flatten(1).mean(1)).sum()
    shown = mask.expand_as(error).flatten(1)
    return (weight * (shown * error.flatten(1)).sum(1) / shown.sum(1).clamp(min=1e-6)).sum()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Squares of bf16 would be too coarse; doubles stay what they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
