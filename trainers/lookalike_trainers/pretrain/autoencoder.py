"""Stage one: the autoencoder, on composites and photographs.

Loss: squared error, plus the squared error of a two-level Laplacian-like pyramid of differences
(edges, a perceptual stand-in that needs no foreign weights), plus a light KL when the encoder is
trained.  With ``decoder_only`` the latent space stands still, and cached latents stay valid.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lookalike_trainers.pretrain.latents import paint_scenes, to_tensor
from lookalike_trainers.pretrain.runs import (
    StopSignal,
    autocast,
    device,
    generator,
    learning_rate,
    load_unfinished,
    save_checkpoint,
)
from lookalike_trainers.pretrain.scenes import Mix, Sprites


@dataclass(frozen=True)
class AutoencoderConfig:
    """One run of the autoencoder."""

    steps: int = 3000
    batch_size: int = 16
    peak_lr: float = 4e-4
    warmup: int = 100
    edges: float = 0.5
    kl: float = 1e-6
    photo_share: float = 0.15
    checkpoint_every: int = 250
    decoder_only: bool = False
    seed: int = 0


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """Squared error of neighbour differences of ``a`` and ``b`` [B, 3, H, W] at two scales."""
    loss = a.new_zeros(())
    for _ in range(2):
        d = a - b
        loss = loss + d.diff(dim=-1).square().mean() + d.diff(dim=-2).square().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


@torch.no_grad()
def scaling_factor(vae: Any, pairs: list[tuple[str, str]], sprites: Sprites) -> float:
    """What makes latents of unit variance, as the noise schedule takes them to be
    (Rombach et al. 2022, appendix G)."""
    pictures = [picture for _, picture in paint_scenes(256, pairs, sprites, Mix(), seed=0)]
    parts = to_tensor(pictures).split(64)
    latents = [vae.encode(part.to(device())).latent_dist.mode() for part in parts]
    return 1 / float(torch.cat(latents).std())


def train(
    vae: Any,
    pairs: list[tuple[str, str]],
    sprites: Sprites,
    photos: list[NDArray[np.uint8]],
    run: Path,
    config: AutoencoderConfig,
) -> dict[str, Any]:
    """Train to ``config.steps`` or to a signal; resume from ``run/autoencoder.pt`` if it exists.

    Returns the last checkpoint's state; its ``model`` is the autoencoder's state dict, and its
    ``scaling_factor`` belongs into the autoencoder's config.  Raises ``Conflict`` where all the
    steps are done.
    """
    where = device()
    vae.to(where).train()
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.peak_lr, fused=True)
    state = load_unfinished(run / "autoencoder.pt", config.steps)
    step, losses = 0, []
    if state is not None:
        step, losses = state["step"], state["losses"]
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    stop = StopSignal()

    def checkpoint() -> dict[str, Any]:
        state = {
            "scaling_factor": scaling_factor(vae, pairs, sprites),
            "step": step,
            "losses": losses,
            "model": vae.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_checkpoint(run / "autoencoder.pt", state)
        return state

    while step < config.steps and not stop:
        rng = random.Random(f"{config.seed} {step}")
        n_photos = round(config.photo_share * config.batch_size)
        batch = rng.choices(photos, k=n_photos)
        scenes = paint_scenes(
            config.batch_size - n_photos, pairs, sprites, Mix(), rng.getrandbits(32)
        )
        x = to_tensor(batch + [picture for _, picture in scenes]).to(where)
        lr = learning_rate(step, config.steps, config.peak_lr, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator(config.seed, step))
            y = vae.decode(posterior.mean + posterior.std * noise.to(where)).sample.float()
        loss = F.mse_loss(y, x) + config.edges * edge_loss(y, x)
        if not config.decoder_only:
            loss = loss + config.kl * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            losses.append((step, loss.item()))
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if step % config.checkpoint_every == 0:
            checkpoint()
    return checkpoint()
