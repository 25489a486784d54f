"""What the base's frozen text encoders make of prompts, computed once. Imports torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lookalike_datasets.features import cache
from lookalike_platform.conditioning import Text


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Ids [prompts, tokens], padded and cut to the length the encoder reads."""
    ids: torch.Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def text_features(
    prompts: Sequence[str], encode: Callable[[Sequence[str]], Text], text_digest: str, folder: Path
) -> Text:
    """The prompts as the frozen text encoders read them, from the cache where it has them.

    Args:
        encode: called only on a miss, with one prompt at a time: a prompt's features do not
            depend on the batch it came in.
        text_digest: names everything that decides `encode`: encoders, tokenizers, resolution.
    """
    texts = []
    for prompt in prompts:
        key = cache.key_of(prompt=prompt, text=text_digest, version=2)
        tensors = cache.read(folder, key)
        if tensors is None:
            with torch.inference_mode():
                text = encode([prompt])
            tensors = {name: t.float().cpu().clone() for name, t in text.tensors().items()}
            cache.write(folder, key, tensors)
        texts.append(Text(**tensors))
    return Text.cat(texts)
