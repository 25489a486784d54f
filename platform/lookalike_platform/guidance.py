"""Guidance: one prediction made of the conditional and the unconditional one. Imports torch."""

from dataclasses import dataclass
from typing import Literal

import torch

from lookalike_platform.steps import guided_answers

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]


@dataclass(frozen=True)
class Guidance:
    """How far predictions are driven away from the negative prompt, and what holds them back.

    scale: classifier-free guidance as diffusers counts it; 1 is none
    rescale: phi of Lin et al. 2024, from 0 (none) to 1
    interval: from and until which share of the way from noise to picture to guide (Kynkäänniemi
        et al. 2024, who give it as noise levels; as shares of the steps in diffusers' guiders)
    threshold: percentile of dynamic thresholding (Saharia et al. 2022), from 0 to 1; None is none
    """

    scale: float = 4.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    threshold: float | None = None

    def acts(self, step: int, steps: int) -> bool:
        """Whether step number `step`, from 0, of `steps` needs the unconditional prediction."""
        return self.scale != 1.0 and step in guided_answers(self.interval, steps)


@dataclass(frozen=True)
class Level:
    """A noise level, x = alpha x0 + sigma e, and what the denoiser says about such x [n, ...]."""

    alpha: float
    sigma: float
    prediction_type: PredictionType

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """The x0 that a prediction means; v = alpha e - sigma x0, and a flow's is e - x0."""
        match self.prediction_type:
            case "epsilon":
                return (noisy - self.sigma * predicted) / self.alpha
            case "v_prediction":
                return self.alpha * noisy - self.sigma * predicted
            case "flow_prediction":
                return noisy - self.sigma * predicted
            case "sample":
                return predicted

    def predicted(self, noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The prediction that means this x0."""
        match self.prediction_type:
            case "epsilon":
                return (noisy - self.alpha * clean) / self.sigma
            case "v_prediction":
                return (self.alpha * noisy - clean) / self.sigma
            case "flow_prediction":
                return (noisy - clean) / self.sigma
            case "sample":
                return clean


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) e(z, c) - w e(z) for a
    guidance scale of 1 + w, as diffusers counts it."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """Lin et al. 2024, eq. 15 and 16: g (phi std(c) / std(g) + 1 - phi), picture by picture.

    A large guidance scale makes predictions larger than any the denoiser learned.
    """
    every = tuple(range(1, guided.ndim))
    ratio = conditional.std(every, keepdim=True) / guided.std(every, keepdim=True)
    return guided * (phi * ratio + 1 - phi)


def threshold(guided: torch.Tensor, conditional: torch.Tensor, percentile: float) -> torch.Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3) of guided x0 [n, ...].

    x0 is clipped to its own percentile s of |x0| and brought to the range r of the data: by r / s,
    where s > r. Pixels have r = 1. Latents have no such end, so that r is the same percentile of
    the x0 predicted without guidance.
    """
    flat = (len(guided), -1)
    own = guided.reshape(flat).float().abs().quantile(percentile, dim=1)
    meant = conditional.reshape(flat).float().abs().quantile(percentile, dim=1)
    shape = (-1, *[1] * (guided.ndim - 1))
    limit = torch.maximum(own, meant).to(guided.dtype).view(shape)
    return guided.clamp(-limit, limit) * (meant.to(guided.dtype).view(shape) / limit)
