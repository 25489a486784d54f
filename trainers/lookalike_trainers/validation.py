"""Pictures of the subject as it is learned so far, drawn while training goes on. Torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lookalike_platform.conditioning import Text
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import TrainingData
from lookalike_trainers.engine import Engine
from lookalike_trainers.painting import STYLE

Say = Callable[[dict[str, Any]], None]


class Validation:
    """Called after each step: draws when the config wants it, and says where the file is.

    All processes draw, since under ZeRO 3 none has the weights alone; rank 0 keeps the picture.
    """

    def __init__(
        self,
        engine: Engine,
        data: TrainingData,
        parts: BaseParts,
        config: TrainingConfig,
        prompt: str | None,
        folder: Path,
        say: Say,
    ) -> None:
        self.engine, self.data, self.parts = engine, data, parts
        self.config, self.prompt, self.folder, self.say = config, prompt, folder, say

    def __call__(self, step: int) -> None:
        wanted = self.config.validation
        if wanted is None or step % wanted.every:
            return
        self.engine.model.eval()  # as the adapter will act
        with self.engine.as_delivered():
            latents = self._latents(wanted.seed)
        self.engine.model.train()
        if self.engine.rank == 0:
            with torch.inference_mode():
                (picture,) = decode(self.parts.vae, latents)
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"step-{step:06d}.png"
            picture.save(path)
            picture_of = {"step": step, "prompt": self.prompt, "file": str(path)}
            self.say({"type": "validation", **picture_of})

    def _latents(self, seed: int) -> torch.Tensor:
        data, device = self.data, self.engine.device
        assert data.validation is not None
        assert self.config.resolution is not None
        vae = self.parts.vae.config
        side = self.config.resolution // self.parts.vae_scale
        latents, generators = noise([seed], vae.latent_channels, side, side)
        text = data.texts[[0, data.validation]].to(device)
        told = Text(torch.empty(1))  # the stand-in below knows its texts
        with torch.no_grad():
            return denoise(
                _Trained(self.engine.model, text, self.config.resolution),
                make_sampler(STYLE.sampler, dict(self.parts.scheduler.config)),
                latents.to(device),
                generators,
                told,
                told,
                steps=STYLE.steps,
                guidance_scale=STYLE.guidance_scale,
            )


class _Trained:
    """The module that trains where sampling expects a UNet.

    text: of the empty prompt and of the picture's; ids, where its text encoders are the module's.
    side: of the picture, in pixels
    """

    def __init__(self, model: Any, text: Text | torch.Tensor, side: int) -> None:
        self.model, self.text = model, text
        self.time_ids = torch.tensor([[side, side, 0, 0, side, side]])

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor]:
        times = timestep.to(latents.device).expand(len(latents))
        told = self.time_ids.to(latents.device).expand(len(latents), -1)
        return (self.model(latents, times, self.text, told).float(),)
