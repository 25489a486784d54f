"""The module that trains: the UNet, and the text encoders where they do, under one forward. Torch.

What a method changes lies inside these parts; the loop, caches and checkpoints see only this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lookalike_platform.conditioning import ANY_SIZE, Text, encode, predict


class Denoiser(nn.Module):
    """Noisy latents [n, c, h, w], timesteps [n] and text to the prediction [n, c, h, w].

    With text encoders, text is ids [n, encoders, tokens]; without, a `Text`. time_ids [n, 6]: the
    pictures' sizes, of which SDXL's UNet is told (conditioning.py).

    Args:
        bf16: autocast; weights that train stay in float32.
        silent: ids [1, encoders, tokens] that say nothing at all: the empty prompt of a base that
            samples with it so.
    """

    def __init__(
        self,
        unet: Any,
        text_encoders: Sequence[Any],
        *,
        bf16: bool,
        silent: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)
        self.bf16 = bf16
        self.silent = silent
        self.train()
        if bf16:
            # Autocast would round the frozen weights anew in every step; the trained ones and
            # their optimiser's state stay in float32.
            for parameter in self.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Text | torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16):
            if isinstance(text, torch.Tensor):
                text = self._encoded(text)
            return predict(self.unet, noisy, timesteps, text.with_time_ids(time_ids))

    def _encoded(self, ids: torch.Tensor) -> Text:
        text = encode(list(self.text_encoders), ids, ANY_SIZE)
        if self.silent is None:
            return text
        return text.silenced((ids == self.silent.to(ids.device)).flatten(1).all(1))


def checkpoint_gradients(unet: Any, text_encoders: Sequence[Any]) -> None:
    """Let both recompute in the backward pass what they would keep (Chen et al. 2016)."""
    unet.enable_gradient_checkpointing()
    for encoder in text_encoders:
        # Transformers 5 renamed it; the old name warns.
        new = getattr(encoder, "activation_checkpointing_enable", None)
        (new or encoder.gradient_checkpointing_enable)({"use_reentrant": False})


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
