"""Stage three: the text encoder and the UNet, trained jointly on cached latents.

v-prediction (Salimans & Ho 2022): with x_t = a x_0 + s e, the target is v = a e - s x_0.  At
16 x 16 latents the noun is decided where the signal-to-noise ratio SNR = a^2 / s^2 is a few
hundredths, and there an error of e hides almost all of x_0; v does not.  The loss weighs x_0's
error by min(SNR + 1, gamma): min-SNR's clamp (Hang et al. 2023) on v's own weighting.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.pretrain.latents import LatentCache
from lookalike_trainers.pretrain.runs import (
    StopSignal,
    autocast,
    device,
    generator,
    learning_rate,
    load_unfinished,
    save_checkpoint,
)


@dataclass(frozen=True)
class DenoiserConfig:
    """One run. ``steps`` may grow between sittings; the rest should not change."""

    steps: int = 6000
    batch_size: int = 64
    peak_lr: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    ema: float = 0.995
    checkpoint_every: int = 250
    seed: int = 0


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that one optimizer and one EMA hold both."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """v for ``noisy`` [B, C, h, w] at timesteps ``t`` [B] under ``tokens`` [B, L]."""
        context = self.text_encoder(tokens).last_hidden_state
        v: Tensor = self.unet(noisy, t, encoder_hidden_states=context).sample
        return v


def alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Stable Diffusion's scaled-linear schedule: a_t^2 for each of ``steps`` timesteps."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def v_loss(
    model: nn.Module,
    x0: Tensor,
    tokens: Tensor,
    t: Tensor,
    noise: Tensor,
    abar: Tensor,
    gamma: float,
) -> Tensor:
    """The weighted v-prediction loss of a batch, a scalar.

    Weight of v's squared error: min(SNR + 1, gamma) / (SNR + 1), with SNR + 1 = 1 / s^2.
    """
    a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
    with autocast():
        v = model(a * x0 + s * noise, t, tokens)
    error = (v.float() - (a * noise - s * x0)).square().mean((1, 2, 3))
    snr_plus_one = 1 / (1 - abar[t])
    return (error * snr_plus_one.clamp(max=gamma) / snr_plus_one).mean()


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids [N, L], padded to the tokenizer's length as the pipeline does."""
    ids: Tensor = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def train(
    model: Denoiser, tokenizer: Any, cache: LatentCache, run: Path, config: DenoiserConfig
) -> dict[str, Any]:
    """Train to ``config.steps`` or to a signal; resume from ``run/denoiser.pt`` if it exists.

    Every step's draws depend on (seed, step) alone, so a resumed run equals an uninterrupted one
    bit for bit on one machine.  Returns the last checkpoint's state.

    Raises ``InvalidRequest`` where the cache does not fill a batch, ``Conflict`` where all the
    steps are done.
    """
    batches = len(cache.captions) // config.batch_size
    if batches == 0:
        raise InvalidRequest(
            f"a batch of {config.batch_size} is more than the {len(cache.captions)} cached scenes: "
            "give a smaller --batch-size, or cache more with `lookalike pretrain latents`"
        )
    where = device()
    model.to(where).train()
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.peak_lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )
    state = load_unfinished(run / "denoiser.pt", config.steps)
    step, losses = 0, []
    if state is not None:
        step, losses = state["step"], state["losses"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = {name: value.detach().to(where) for name, value in state["ema"].items()}
    parameters, averages = [*model.parameters()], [*ema.values()]

    tokens = tokenize(tokenizer, cache.captions).to(where)
    empty = tokenize(tokenizer, [""]).to(where)
    abar = alphas_cumprod().to(where)
    stop, recent, started = StopSignal(), list[float](), time.monotonic()

    def checkpoint() -> dict[str, Any]:
        state = {
            "step": step,
            "losses": losses,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema,
        }
        save_checkpoint(run / "denoiser.pt", state)
        return state

    while step < config.steps and not stop:
        epoch, batch = divmod(step, batches)
        order = torch.randperm(len(cache.captions), generator=generator(config.seed, 1, epoch))
        rows = order[batch * config.batch_size : (batch + 1) * config.batch_size].sort().values
        draw = generator(config.seed, 2, step)
        x0 = torch.from_numpy(cache.latents[rows.numpy()].astype(np.float32)).to(where)
        noise = torch.randn(x0.shape, generator=draw).to(where)
        t = stratified_timesteps(len(rows), draw).to(where)
        dropped = (torch.rand(len(rows), 1, generator=draw) < config.caption_dropout).to(where)
        text = torch.where(dropped, empty, tokens[rows.to(where)])

        lr = learning_rate(step, config.steps, config.peak_lr, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = v_loss(model, x0, text, t, noise, abar, config.min_snr_gamma)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A young average forgets faster, so that it is not held back by the starting weights.
        torch._foreach_lerp_(
            averages, [p.data for p in parameters], 1 - min(config.ema, (step + 1) / (step + 10))
        )
        step += 1
        recent.append(loss.item())
        if step % 50 == 0:  # the first time after a resume, over the steps of this sitting alone
            losses.append((step, sum(recent) / len(recent)))
            pace = (time.monotonic() - started) / len(recent)
            print(f"step {step} loss {losses[-1][1]:.4f} lr {lr:.2e} {pace:.2f} s/step", flush=True)
            recent, started = [], time.monotonic()
        if step % config.checkpoint_every == 0:
            checkpoint()
    return checkpoint()


def stratified_timesteps(count: int, draw: torch.Generator) -> Tensor:
    """One timestep of 0..999 from each of ``count`` equal strata, shuffled: less noisy losses."""
    u = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    return (u * 1000).long().clamp(max=999)[torch.randperm(count, generator=draw)]
