"""Merges of LoRAs against PEFT's own functions and formulas written out entry by entry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from lookalike_registry.compose.dare import dare_linear
from lookalike_registry.compose.low_rank import LowRank, compress, shorten
from lookalike_registry.compose.ties import ties
from lookalike_registry.compose.weighted_sum import weighted_sum


def a_pair(rank: int, *, out: int = 9, shape: tuple[int, ...] = (7,)) -> LowRank:
    return LowRank(torch.randn(out, rank), torch.randn(rank, *shape))


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.tuples(st.integers(1, 12), st.floats(-2, 2)), min_size=1, max_size=4),
    convolution=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_weighted_sum_is_the_sum_of_what_each_adds(
    parts: list[tuple[int, float]], convolution: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pairs = [a_pair(rank, shape=(5, 3, 3) if convolution else (7,)) for rank, _ in parts]
    found = weighted_sum(pairs, [weight for _, weight in parts]).dense()
    expected = sum(
        weight * torch.einsum("or,r...->o...", pair.up, pair.down)
        for pair, (_, weight) in zip(pairs, parts, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    inner=st.integers(1, 15),
    rank=st.integers(1, 10),
    convolution=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_shortening_a_pair_is_compressing_what_it_stands_for(
    inner: int, rank: int, convolution: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pair = a_pair(inner, shape=(3, 2, 2) if convolution else (7,))
    short, dense = shorten(pair, rank=rank), compress(pair.dense().double(), rank=rank)
    assert short.down.shape[1:] == pair.down.shape[1:]
    torch.testing.assert_close(short.dense().double(), dense.dense(), rtol=1e-4, atol=1e-4)
    assert short.error == pytest.approx(dense.error, rel=1e-4, abs=1e-5)


def deltas(count: int, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_of_equal_weights_is_pefts(density: float) -> None:
    given = deltas(4)
    theirs = merge_utils.ties(given, torch.full((4,), 0.7, dtype=torch.float64), density)
    torch.testing.assert_close(ties(given, [0.7] * 4, density=density), theirs)


def test_ties_trims_votes_and_averages_entry_by_entry() -> None:
    given, weights = deltas(3), [1.0, 0.4, -0.8]
    trimmed = []
    for weight, delta in zip(weights, given, strict=True):
        flat = delta.numpy().ravel()
        least = sorted(abs(flat))[-15]  # half of the 30 entries stay
        trimmed.append([weight * value if abs(value) >= least else 0.0 for value in flat])
    expected = []
    for entry in zip(*trimmed, strict=True):
        elected = np.sign(sum(entry))
        agreeing = [value for value in entry if value and np.sign(value) == elected]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    found = ties(given, weights, density=0.5)
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=1e-12)


def test_dare_is_pefts_when_it_draws_the_same() -> None:
    given, weights = deltas(3), [1.0, 0.5, -0.3]
    torch.manual_seed(5)
    theirs = merge_utils.dare_linear(given, torch.tensor(weights, dtype=torch.float64), 0.4)
    ours = dare_linear(given, weights, density=0.4, draws=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, theirs)


def test_dare_keeps_the_sum_on_average() -> None:
    given, weights = deltas(2), [1.0, -0.5]
    draws = torch.Generator().manual_seed(0)
    many = torch.stack([dare_linear(given, weights, density=0.5, draws=draws) for _ in range(4000)])
    expected = given[0] - 0.5 * given[1]
    error = many.std(0) / len(many) ** 0.5
    assert ((many.mean(0) - expected).abs() < 5 * error).all()


def test_nothing_is_dropped_at_density_one() -> None:
    given = deltas(2)
    kept = dare_linear(given, [1.0, 2.0], density=1, draws=torch.Generator())
    torch.testing.assert_close(kept, given[0] + 2 * given[1])
    torch.testing.assert_close(ties(given[:1], [2.0], density=1), 2 * given[0])


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        ties(deltas(2), [1.0, 1.0], density=density)
    with pytest.raises(ValueError, match="density"):
        dare_linear(deltas(2), [1.0, 1.0], density=density, draws=torch.Generator())
