"""The probability flow ODE of a variance preserving diffusion, by Euler's steps. Imports torch."""

from typing import Any

import torch
from diffusers import DDIMScheduler

from lookalike_platform.guidance import Level


class ProbabilityFlowScheduler(DDIMScheduler):
    """Song et al. 2021 (score-based generative modeling through SDEs), equations 11 and 13.

    dx = -1/2 beta(t) (x + score(x, t)) dt, the score being -e / sigma_t. From t back to s < t the
    integral of beta is log(abar_s / abar_t), so that an Euler step is

        x_s = x_t + 1/2 log(abar_s / abar_t) (x_t - e / sigma_t).

    DDIM without noise solves the same equation and integrates its linear part exactly: it needs
    fewer steps. Timesteps and noise levels are DDIM's.
    """

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        """x_s of x_t, `sample`, and of what the denoiser predicts for it, both [n, ...]."""
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps
        now = self.alphas_cumprod[timestep]
        then = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        alpha, sigma = float(now) ** 0.5, (1 - float(now)) ** 0.5
        clean = Level(alpha, sigma, self.config.prediction_type).clean(sample, model_output)
        error = Level(alpha, sigma, "epsilon").predicted(sample, clean)
        return (sample + 0.5 * float(torch.log(then / now)) * (sample - error / sigma),)
