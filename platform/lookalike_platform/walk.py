"""The pictures of one request on their way from noise to latents. Imports torch."""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from lookalike_platform.guidance import Guidance, Level, guide, rescale, threshold
from lookalike_platform.steps import steps_made


@dataclass(frozen=True)
class Start:
    """A picture to start from, in place of noise alone.

    latents: [n, channels, height, width], one for each picture made
    strength: the share of the way that is walked: 1 keeps next to nothing of the picture
    mask: [1 or n, 1, height, width], 1 where to paint and 0 where the picture stays; None paints
        everywhere
    """

    latents: torch.Tensor
    strength: float
    mask: torch.Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        mask = None if self.mask is None else self.mask.to(device, dtype)
        return replace(self, latents=self.latents.to(device, dtype), mask=mask)


class Walk:
    """Pictures that are all at the same step: ask the denoiser, answer, until done.

    latents: [n, channels, height, width], as noisy as the step has them
    count, total: times the denoiser has answered, and will have; second order samplers ask more
        than once a step
    """

    def __init__(
        self,
        sampler: Any,
        noise: torch.Tensor,
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance: Guidance,
        start: Start | None = None,
        eta: float = 0.0,
    ) -> None:
        """
        Args:
            sampler: a fresh diffusers scheduler; it has state.
            noise: unit Gaussian noise [n, channels, height, width].
            generators: one for each picture, for samplers that add noise on the way.
            start: image-to-image (SDEdit, Meng et al. 2022), with a mask inpainting.
            eta: share of DDPM's noise that DDIM adds; others take none, or have it 0.
        """
        self.guidance = guidance
        self._sampler = sampler
        self._noise = noise
        self._start = start
        sampler.set_timesteps(steps, device=noise.device)
        taken = inspect.signature(sampler.step).parameters
        self._options: dict[str, Any] = {"generator": generators} if "generator" in taken else {}
        if "eta" in taken:  # also 0: some have another one of their own
            self._options["eta"] = eta

        skipped = 0 if start is None else steps - steps_made(steps, start.strength)
        whole = _visits(sampler, 0)
        self._timesteps = _visits(sampler, skipped)
        self._skipped = len(whole) - len(self._timesteps)
        if start is not None and hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(self._skipped)
        self.count, self.total = 0, len(self._timesteps)

        if start is None or (start.mask is not None and start.strength == 1):
            self.latents = noise * getattr(sampler, "init_noise_sigma", 1.0)
        else:
            self.latents = self._noised(start.latents)

    @property
    def done(self) -> bool:
        return self.count == self.total

    @property
    def guided(self) -> bool:
        """Whether this step needs the unconditional prediction too."""
        return self.guidance.acts(self._skipped + self.count, self._skipped + self.total)

    def ask(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser is to look at: latents [n, ...] scaled for it, and timesteps [n]."""
        timestep = self._timesteps[self.count]
        seen = self.latents
        if hasattr(self._sampler, "scale_model_input"):
            seen = self._sampler.scale_model_input(seen, timestep)
        return seen, timestep.to(seen.device).expand(len(seen))

    def answer(self, conditional: torch.Tensor, unconditional: torch.Tensor | None = None) -> None:
        """Go one step on with what the denoiser predicts [n, ...], without and, where `guided`,
        with the negative prompt in place of the prompt."""
        predicted = conditional
        if self.guided:
            assert unconditional is not None
            predicted = self._guide(conditional, unconditional)
        timestep = self._timesteps[self.count]
        self.latents = self._sampler.step(
            predicted, timestep, self.latents, return_dict=False, **self._options
        )[0]
        self.count += 1
        if self._start is not None and self._start.mask is not None:
            known = self._start.latents if self.done else self._noised(self._start.latents)
            mask = self._start.mask
            self.latents = (1 - mask) * known + mask * self.latents

    def _guide(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        guidance = self.guidance
        guided = guide(unconditional, conditional, guidance.scale)
        if guidance.rescale:
            guided = rescale(guided, conditional, guidance.rescale)
        if guidance.threshold is not None:
            seen, level = self.ask()[0], self._level()
            clean = threshold(
                level.clean(seen, guided), level.clean(seen, conditional), guidance.threshold
            )
            guided = level.predicted(seen, clean)
        return guided

    def _level(self) -> Level:
        """Of what `ask` returns, which even samplers that let the noise grow scale to unit size."""
        flows = hasattr(self._sampler, "scale_noise")
        kind: Any = "flow_prediction" if flows else self._sampler.config.prediction_type
        if not hasattr(self._sampler, "sigmas"):
            share = float(self._sampler.alphas_cumprod[int(self._timesteps[self.count])])
            return Level(share**0.5, (1 - share) ** 0.5, kind)
        sigmas = self._sampler.sigmas
        # Its middles lie between two of these; the ancestral one's are the next ones.
        middles = type(self._sampler).__name__ == "KDPM2DiscreteScheduler"
        if middles and not self._sampler.state_in_first_order:
            sigmas = self._sampler.sigmas_interpol
        sigma = float(sigmas[self._skipped + self.count])
        if kind == "flow_prediction":
            return Level(1 - sigma, sigma, kind)
        alpha = (1 + sigma**2) ** -0.5
        return Level(alpha, sigma * alpha, kind)

    def _noised(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with the request's own noise, as much as the step to come begins with."""
        timesteps = self._timesteps[self.count].expand(len(latents))
        if hasattr(self._sampler, "scale_noise"):
            noised: torch.Tensor = self._sampler.scale_noise(latents, timesteps, self._noise)
        else:
            noised = self._sampler.add_noise(latents, self._noise, timesteps)
        return noised


def _visits(sampler: Any, skipped: int) -> torch.Tensor:
    """The timesteps at which the denoiser is asked, when the first `skipped` steps are left out.

    PNDM makes its first step twice, wherever it begins: its own list says so of the whole way only.
    """
    timesteps: torch.Tensor = sampler.timesteps
    if type(sampler).__name__ != "PNDMScheduler" or not sampler.config.skip_prk_steps:
        return timesteps[skipped * getattr(sampler, "order", 1) :]
    rest = timesteps.unique().flip(0)[skipped:]
    return torch.cat([rest[:1], rest[1:2], rest[1:]])
