"""Pictures from prompts, through plain diffusers: DPM-Solver++ and classifier-free guidance."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookalike_trainers.pretrain.runs import autocast, device


def load_pipeline(folder: Path) -> Any:
    """The ``StableDiffusionPipeline`` of ``folder``, with the sampler that the bars name."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )
    pipe.set_progress_bar_config(disable=True)
    if not torch.cuda.is_available():
        pipe.unet.set_attn_processor(AttnProcessor())  # twice as fast as the fused one on a CPU
    return pipe.to(device())


@torch.no_grad()
def sample(
    pipe: Any, prompts: list[str], *, guidance: float, steps: int, seed: int = 0, batch: int = 50
) -> Tensor:
    """One picture a prompt, [N, 3, H, W] on [-1, 1]; picture i has the noise of seed + i."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        with autocast():
            out = pipe(
                part,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=draws,
                output_type="pt",
            )
        pictures.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(pictures)
