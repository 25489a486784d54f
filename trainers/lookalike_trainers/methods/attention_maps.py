"""Where a UNet's cross-attention looks for a word, while it trains. Torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lookalike_trainers.objective import at_least_float32


class AttentionMaps:
    """The attention probabilities of the last forward of a UNet, as training's graph has them.

    It takes the place of its cross-attention layers' processors: softmax(Q K^T / sqrt(d)) V, with
    the softmax in sight, which the fused kernels never hold.
    """

    def __init__(self, unet: Any, layers: Sequence[Any]) -> None:
        self.maps: list[torch.Tensor] = []
        unet.register_forward_pre_hook(self._forget)
        for layer in layers:
            layer.set_processor(self)

    def take(self) -> dict[int, torch.Tensor]:
        """By number of places h * w, probabilities [n, places, tokens]: the mean over the heads
        of all layers of that size. They are handed over once, and not kept."""
        taken, self.maps = self.maps, []
        sizes: dict[int, list[torch.Tensor]] = {}
        for probabilities in taken:
            sizes.setdefault(probabilities.shape[-2], []).append(probabilities)
        return {
            places: at_least_float32(torch.cat(of, dim=1).mean(1)) for places, of in sizes.items()
        }

    def _forget(self, *_: Any) -> None:
        self.maps = []

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A processor's call: hidden_states [n, places, width] to the same shape."""
        assert attention_mask is None  # the trainer masks no text
        query, key, value = (
            layer(read).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, read in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
        if probabilities.requires_grad:
            self.maps.append(probabilities)
        answer = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            answer = layer(answer)
        return answer


def attention_outside(
    maps: Mapping[int, torch.Tensor], ids: torch.Tensor, tokens: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """How much the tokens look at what the mask hides, a scalar (Gu et al. 2023, published code).

    sum over sizes and tokens of the mean of A / max A where the mask is 0, A being a token's map;
    the mean of that over the samples that have the token and hide something.

    Args:
        maps: as `AttentionMaps.take` gives them.
        ids: [n, tokens], the prompts'.
        mask: [n, 1, h, w] in 0..1.
    """
    total = mask.new_zeros(())
    for places, probabilities in maps.items():
        outside = 1 - _shown(mask, places).flatten(1)
        for token in tokens:
            at = ids == token
            counted = at.any(1) & (outside.sum(1) > 0)
            if not counted.any():
                continue
            seen = probabilities[counted, :, at.int().argmax(1)[counted]]
            seen = seen / seen.amax(1, keepdim=True)
            hidden = outside[counted]
            total = total + ((seen * hidden).sum(1) / hidden.sum(1)).mean()
    return total


def _shown(mask: torch.Tensor, places: int) -> torch.Tensor:
    """The mask where the UNet has so many places; one is hidden when all of it is.

    Each level halves both sides and rounds up. Raises ValueError for a number that no level has.
    """
    small = mask
    while small[0].numel() > places:
        small = nn.functional.max_pool2d(small, 2, ceil_mode=True)
    if small[0].numel() != places:
        raise ValueError(f"no level of a UNet has {places} places of {tuple(mask.shape[2:])}")
    return small
