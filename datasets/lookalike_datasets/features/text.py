"""What the base's frozen text encoder makes of prompts, computed once. Imports torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lookalike_datasets.features import cache


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
    prompts: Sequence[str], tokenizer: Any, load_encoder: Any, text_digest: str, folder: Path
) -> torch.Tensor:
    """Features [prompts, tokens, width], from the cache where it has them.

    Args:
        load_encoder: called (once, and only on a miss) for the CLIPTextModel.
        text_digest: names encoder and tokenizer.
    """
    keys = [cache.key_of(prompt=p, text=text_digest, version=1) for p in prompts]
    found = [cache.read(folder, key) for key in keys]
    missing = [i for i, tensors in enumerate(found) if tensors is None]
    if missing:
        encoder = load_encoder()
        with torch.inference_mode():
            for i in missing:
                ids = tokenize(tokenizer, [prompts[i]]).to(encoder.device)
                features = encoder(ids)[0][0].float().cpu().clone()
                found[i] = {"features": features}
                cache.write(folder, keys[i], {"features": features})
    return torch.stack([tensors["features"] for tensors in found if tensors is not None])
