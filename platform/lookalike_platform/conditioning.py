"""What a denoiser is told besides the noisy latents: text, and for SDXL size. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

ANY_SIZE = 0
"""The resolution of text whose size is told later, or that nobody reads."""


@dataclass(frozen=True)
class Text:
    """Prompts as the denoiser reads them.

    features: [n, tokens, width]
    pooled: [n, pooled width] for SDXL, whose denoiser takes both; else None
    time_ids: [n, 6] for SDXL: height and width of the original, of the crop's corner, and of the
        picture, in pixels (Podell et al. 2023, section 2.2); else None
    """

    features: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> Self:
        """The prompts of these rows: a slice, or a list of numbers."""
        return self._each(lambda tensor: tensor[rows])

    def expand(self, n: int) -> Self:
        """One prompt n times, or n prompts as they are."""
        return self._each(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return self._each(lambda tensor: tensor.to(device, dtype))

    @classmethod
    def cat(cls, texts: Sequence[Self]) -> Self:
        joined: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(text, field.name) for text in texts]
            joined[field.name] = None if parts[0] is None else torch.cat(parts)
        return cls(**joined)

    def silenced(self, rows: torch.Tensor | None = None) -> Self:
        """Features of nothing, as SDXL takes an empty negative prompt; sizes stay.

        Args:
            rows: [n], which prompts are silenced; None: all.
        """

        def silent(tensor: torch.Tensor) -> torch.Tensor:
            if rows is None:
                return torch.zeros_like(tensor)
            return tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0)

        pooled = None if self.pooled is None else silent(self.pooled)
        return type(self)(silent(self.features), pooled, self.time_ids)

    def of_size(self, height: int, width: int) -> Self:
        """The prompts for pictures of this size in pixels, whole and uncut."""
        told = torch.tensor([[height, width, 0, 0, height, width]], device=self.features.device)
        return self.with_time_ids(told.expand(len(self), -1))

    def with_time_ids(self, time_ids: torch.Tensor) -> Self:
        """The prompts for pictures of these sizes [n, 6], where the denoiser is told of them."""
        if self.time_ids is None:
            return self
        # Sines are taken of them: bf16 would round 1023 to 1024.
        return type(self)(self.features, self.pooled, time_ids.float())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is not None, by name: `Text(**text.tensors())` is the text again."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _each(self, change: Any) -> Self:
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors().items()})


def predict(unet: Any, latents: torch.Tensor, timesteps: torch.Tensor, text: Text) -> torch.Tensor:
    """The denoiser's answer [n, c, h, w] about noisy latents at timesteps [n] or a single one."""
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    predicted: torch.Tensor = unet(
        latents, timesteps, text.features, added_cond_kwargs=added, return_dict=False
    )[0]
    return predicted


def pool_at_end(encoders: Sequence[Any], tokenizers: Sequence[Any]) -> None:
    """Let encoders sum a prompt up at its end mark.

    The published configurations of SDXL say 2 for its id, by which transformers means the largest
    id there is: with learned words, which follow the vocabulary, that would be one of those.
    """
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id


def encode(encoders: Sequence[Any], ids: torch.Tensor, resolution: int) -> Text:
    """The text encoders' answer to ids [n, encoders, tokens].

    One encoder (Stable Diffusion 1 and 2): its last hidden states. Two (SDXL): the last but one of
    each, side by side, and the second's projected summary.

    Args:
        resolution: side in pixels of the picture, of which SDXL's denoiser is told.
    """
    if len(encoders) == 1:
        return Text(encoders[0](ids[:, 0])[0])
    answers = [
        encoder(ids[:, place], output_hidden_states=True) for place, encoder in enumerate(encoders)
    ]
    features = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
    size = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]])
    return Text(
        features,
        answers[-1].text_embeds,
        size.expand(len(ids), -1).to(features.device, features.dtype),
    )
