"""Low-rank compression against NumPy's full SVD."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lookalike_registry.compose.low_rank import LowRank, compress


def truncated(delta: Tensor, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(delta.double().flatten(1).numpy(), full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def product(found: LowRank) -> np.ndarray:
    return (found.up.double() @ found.down.double().flatten(1)).numpy()


def lost(delta: Tensor, approximation: np.ndarray) -> float:
    exact = delta.double().numpy()
    return float(np.linalg.norm(exact - approximation) / np.linalg.norm(exact))


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 20),
    width=st.integers(1, 20),
    rank=st.integers(1, 25),
    seed=st.integers(0, 2**16),
)
def test_a_rank_keeps_what_the_svd_keeps(out: int, width: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(out, width, dtype=torch.float64)
    found = compress(delta, rank=rank)
    kept = min(rank, out, width)
    assert (found.up.shape, found.down.shape) == ((out, kept), (kept, width))
    best = truncated(delta, rank)
    # The distance from delta is what the SVD makes least; the matrix itself is free in ties.
    assert found.error == pytest.approx(lost(delta, best), rel=1e-6, abs=1e-7)
    assert found.error == pytest.approx(lost(delta, product(found)), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("shape", [(320, 96), (96, 320), (64, 64)])
def test_float32_weights_compress_to_the_svd_in_full_precision(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -4, min(shape))  # as trained deltas have: a few strong directions
    delta = (torch.randn(shape[0], min(shape)) * spectrum) @ torch.randn(min(shape), shape[1])
    found = compress(delta, rank=8)
    assert found.up.dtype == found.down.dtype == torch.float32
    np.testing.assert_allclose(product(found), truncated(delta, 8), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    share=st.floats(0.01, 1, exclude_max=True),
    out=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_a_share_keeps_the_fewest_values_that_reach_it(share: float, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(out, 12, dtype=torch.float64)
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    reached = np.cumsum(values) / values.sum()
    kept = compress(delta, share=share).up.shape[1]
    assert reached[kept - 1] >= share - 1e-9
    assert kept == 1 or reached[kept - 2] < share + 1e-9


def test_a_convolution_comes_back_in_its_own_shape() -> None:
    torch.manual_seed(0)
    delta = torch.randn(6, 4, 3, 3)
    found = compress(delta, rank=6)
    assert found.down.shape == (6, 4, 3, 3)
    torch.testing.assert_close(found.dense(), delta)


def test_a_change_of_low_rank_survives_whole_whatever_rank_is_asked() -> None:
    torch.manual_seed(0)
    delta = torch.randn(30, 3) @ torch.randn(3, 20)
    for rank in (3, 10):
        found = compress(delta, rank=rank)
        assert found.error < 1e-6
        torch.testing.assert_close(found.dense(), delta)
    assert compress(delta, share=1).up.shape[1] == 3


def test_both_halves_are_of_one_size() -> None:
    torch.manual_seed(0)
    found = compress(torch.randn(40, 30), rank=5)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


def test_the_error_includes_the_rounding_to_half_precision() -> None:
    torch.manual_seed(0)
    delta = torch.randn(20, 20).half()
    found = compress(delta, rank=20)
    assert 1e-5 < found.error == pytest.approx(lost(delta, product(found)))


def test_no_change_compresses_to_zeros() -> None:
    for found in (compress(torch.zeros(4, 3), rank=2), compress(torch.zeros(4, 3), share=0.6)):
        assert found.error == 0
        assert not found.up.any()
        assert not found.down.any()


def test_a_compression_without_a_sound_measure_is_refused() -> None:
    for wrong in ({}, {"rank": 2, "share": 0.5}, {"rank": 0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(ValueError, match=r"rank|share"):
            compress(torch.ones(2, 2), **wrong)  # type: ignore[arg-type]
