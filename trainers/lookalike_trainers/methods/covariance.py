"""How a base's text encodings are spread: C = mean of e e^T over the tokens of captions. Torch.

In the metric of C^-1 the directions that all captions share count little, so that e^T C^-1 i says
how much of the concept i is in the token e (Meng et al. 2022, eq. 2; Tewel et al. 2023, 4.2).
"""

from typing import Any

import torch

from lookalike_datasets.features import cache
from lookalike_datasets.features.text import tokenize
from lookalike_platform.conditioning import encode
from lookalike_trainers.pretrain.nouns import training_nouns
from lookalike_trainers.templates import OBJECT

CAPTIONS = tuple(
    OBJECT[(3 * number + place) % len(OBJECT)].format(noun)
    for number, noun in enumerate(training_nouns())
    for place in range(3)
)
"""Three captions each of 212 nouns: animals, food, places, vehicles, things."""
RIDGE = 0.1
_AT_ONCE = 64


def precision(parts: Any, resolution: int) -> torch.Tensor:
    """(C + RIDGE tr(C) / d I)^-1, [d, d] in float64.

    The ridge keeps directions that hardly any caption has from deciding: with it a concept is
    recognised in other sentences than the one it was learned in.
    """
    covariance = caption_covariance(parts, resolution)
    ridge = RIDGE * covariance.trace() / len(covariance)
    return torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).to(covariance))


def caption_covariance(parts: Any, resolution: int) -> torch.Tensor:
    """C, [d, d] in float64, from the cache if it is there; half a minute on SD 1.5 if not.

    Of the tokens from the start mark to the end mark, without padding.
    """
    if parts.cache is None:
        return _covariance(parts, resolution)
    folders = [folder for folder in sorted(parts.folder.glob("t*")) if folder.is_dir()]
    digests = [cache.component_digest(folder) for folder in folders]
    key = cache.key_of(covariance=digests, captions=list(CAPTIONS), version=1)
    found = cache.read(parts.cache / "text", key)
    if found is None:
        found = {"covariance": _covariance(parts, resolution)}
        cache.write(parts.cache / "text", key, found)
    return found["covariance"].to(parts.device)


@torch.no_grad()
def _covariance(parts: Any, resolution: int) -> torch.Tensor:
    ids = torch.stack([tokenize(tokenizer, CAPTIONS) for tokenizer in parts.tokenizers], dim=1)
    ended = (ids[:, 0] == parts.tokenizers[0].eos_token_id).cumsum(1)
    said = (ended == 0) | ((ended == 1) & (ended.roll(1, 1) == 0))  # the end mark itself too
    longest = int(said.sum(1).max())  # the encoders are causal: what follows changes nothing
    ids, said = ids[..., :longest].to(parts.device), said[:, :longest].to(parts.device)
    total, count = None, 0
    for some, here in zip(ids.split(_AT_ONCE), said.split(_AT_ONCE), strict=True):
        spoken = encode(parts.text_encoders, some, resolution).features[here].double()
        square = spoken.T @ spoken
        total = square if total is None else total + square
        count += len(spoken)
    assert total is not None
    return total / count
