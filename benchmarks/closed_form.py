"""Custom Diffusion at Stable Diffusion 1.5's size: merging ten concepts, compressing one.

merge       ten concepts into all 32 K and V weights of the 16 cross-attention layers, with 200
            captions of 77 tokens, and six words a concept: "{token} {noun}" twice and their ends
formula     the same as published: float32, C made and inverted anew in every layer, words that are
            exactly equal dropped (the layers share nothing)
compress    one concept's 32 deltas to 60% of their singular values
numpy       the same by numpy.linalg.svd

Random weights and features: the arithmetic does not depend on what they hold. The two of a pair
take turns in one process; medians are compared.
Bars: merge within 20 s, compress within 10 s, on 2 cores.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lookalike_registry.compose.closed_form import ConceptWords, TextStatistics
from lookalike_registry.compose.low_rank import compress

TEXT_WIDTH = 768
LAYERS = [320] * 5 + [640] * 5 + [1280] * 6  # cross-attention widths, each with a K and a V
CAPTIONS, TOKENS, WORDS = 200, 77, 6
SHARE = 0.6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--concepts", type=int, default=10)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    torch.manual_seed(0)
    captions = torch.randn(CAPTIONS, TOKENS, TEXT_WIDTH)[:, 1:].flatten(0, 1)
    words = [torch.randn(WORDS, TEXT_WIDTH) for _ in range(given.concepts)]
    base = [torch.randn(width, TEXT_WIDTH) * 0.03 for width in LAYERS for _ in "kv"]
    tuned = [[weight + torch.randn_like(weight) * 1e-3 for _ in words] for weight in base]
    deltas = [own[0] - weight for weight, own in zip(base, tuned, strict=True)]

    _compare(
        {
            "merge": lambda: _merge(captions, words, base, tuned),
            "formula": lambda: _formula(captions, words, base, tuned),
        },
        given.rounds,
        bar=20,
    )
    _compare(
        {
            "compress": lambda: [compress(delta, share=SHARE) for delta in deltas],
            "numpy": lambda: [_numpy(delta.numpy()) for delta in deltas],
        },
        given.rounds,
        bar=10,
    )


def _compare(pair: dict[str, Callable[[], object]], rounds: int, bar: float) -> None:
    times: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(rounds):
        for name, work in pair.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    ours, theirs = pair
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:9} {median:7.2f} s (median of {rounds})")
    print(f"{ours}: bar {bar:.0f} s; {theirs} / {ours}  {medians[theirs] / medians[ours]:.1f}")


def _merge(
    captions: Tensor, words: list[Tensor], base: list[Tensor], tuned: list[list[Tensor]]
) -> list[Tensor]:
    bound = ConceptWords.of(TextStatistics.of(captions), words)
    return [bound.merge_layer(weight, own) for weight, own in zip(base, tuned, strict=True)]


def _formula(
    captions: Tensor, words: list[Tensor], base: list[Tensor], tuned: list[list[Tensor]]
) -> list[Tensor]:
    keys = torch.cat(words)
    first = [i for i, row in enumerate(keys) if not (keys[:i] == row).all(1).any()]
    keys = keys[first]
    merged = []
    for weight, own in zip(base, tuned, strict=True):
        pairs = zip(words, own, strict=True)
        values = torch.cat([mine @ changed.T for mine, changed in pairs])[first]
        d = keys @ torch.linalg.inv(captions.T @ captions)
        missing = values.T - weight @ keys.T
        merged.append(weight + missing @ torch.linalg.inv(d @ keys.T) @ d)
    return merged


def _numpy(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    rank = int(np.searchsorted(np.cumsum(values), SHARE * values.sum())) + 1
    return left[:, :rank] * values[:rank], right[:rank]


if __name__ == "__main__":
    main()
