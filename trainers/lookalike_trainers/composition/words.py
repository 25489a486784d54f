"""Text features for Custom Diffusion's closed form: of captions at large, and of words. Torch."""

from contextlib import ExitStack

import torch
from torch import Tensor

from lookalike_registry.compose.closed_form import TextStatistics
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.observing import WORD, called
from lookalike_trainers.composition.request import ParentFile
from lookalike_trainers.methods.covariance import CAPTIONS
from lookalike_trainers.methods.find import wear_of

BEFORE = "photo of a"
_AT_ONCE = 64


@torch.no_grad()
def statistics(parts: BaseParts, resolution: int) -> TextStatistics:
    """Of one caption of each of 212 nouns, first tokens left out."""
    captions = CAPTIONS[::3]
    encoded = [
        parts.encode(captions[start : start + _AT_ONCE], resolution).features[:, 1:].flatten(0, 1)
        for start in range(0, len(captions), _AT_ONCE)
    ]
    return TextStatistics.of(torch.cat(encoded).cpu())


@torch.no_grad()
def features(parts: BaseParts, parent: ParentFile, resolution: int) -> Tensor:
    """K* [tokens, in] of a parent's words: "{V*} {noun}" and the same in "photo of a {V*} {noun}",
    each up to its end mark, as Custom Diffusion's published code takes them."""
    rows = []
    with ExitStack() as undo:
        undo.callback(wear_of(parent.method)(parts, parent.file, parent.scale, WORD))
        for spoken in called(parent.subjects):
            for before in ("", BEFORE):
                prompt = f"{before} {spoken}".strip()
                start, end = 1 + _count(parts, before), 2 + _count(parts, prompt)
                rows.append(parts.encode([prompt], resolution).features[0, start:end].cpu())
    return torch.cat(rows)


def _count(parts: BaseParts, text: str) -> int:
    """Tokens of a text without its marks, where it fits."""
    ids = parts.ids([text])[0, 0]
    end = parts.tokenizers[0].eos_token_id
    return int((ids == end).nonzero()[0]) - 1
