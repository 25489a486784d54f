"""Gradient fusion against NumPy's least squares and against the descent that it replaces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lookalike_registry.compose.fusion import RIDGE, Fusion
from lookalike_registry.compose.low_rank import LowRank

OUT, WIDTH, RANK = 6, 10, 3
EXACT = 1e-6  # as ridge: the least-squares problem as it stands


def concepts(count: int, tokens: int = 30) -> tuple[Tensor, list[LowRank], list[Tensor]]:
    """W0, each concept's LoRA and its inputs [tokens, in], float64."""
    torch.manual_seed(0)
    base = torch.randn(OUT, WIDTH, dtype=torch.float64)
    sizes = [(OUT, RANK), (RANK, WIDTH)]
    pairs = [
        LowRank(*(0.5 * torch.randn(size, dtype=torch.float64) for size in sizes))
        for _ in range(count)
    ]
    inputs = [torch.randn(tokens, WIDTH, dtype=torch.float64) for _ in range(count)]
    return base, pairs, inputs


def fused(pairs: list[LowRank], inputs: list[Tensor], ridge: float = RIDGE) -> LowRank:
    fusion = Fusion(pairs, ridge)
    for place, seen in enumerate(inputs):
        fusion.observe(place, seen)
    return fusion.merged()


@pytest.mark.parametrize("tokens", [30, 2])
def test_fusion_is_the_ridge_regression_of_all_concepts_outputs(tokens: int) -> None:
    base, pairs, inputs = concepts(3, tokens)
    rows = torch.cat(inputs).numpy()
    tuned = [base + pair.dense() for pair in pairs]
    outputs = torch.cat([x @ w.T for w, x in zip(tuned, inputs, strict=True)]).numpy()
    ridge = np.sqrt(RIDGE * (rows**2).sum() / WIDTH)
    rows = np.vstack([rows, ridge * np.eye(WIDTH)])
    plain_sum = base + torch.stack([pair.dense() for pair in pairs]).sum(0)
    outputs = np.vstack([outputs, ridge * plain_sum.numpy().T])
    expected = np.linalg.lstsq(rows, outputs)[0].T
    found = fused(pairs, inputs)
    assert len(found.down) == 3 * RANK
    np.testing.assert_allclose((base + found.dense()).numpy(), expected, rtol=1e-8, atol=1e-8)


def test_the_published_descent_ends_where_the_formula_does() -> None:
    base, pairs, inputs = concepts(3)
    tuned = [base + pair.dense() for pair in pairs]
    weight = base.clone().requires_grad_()
    descent = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        off = [seen @ (weight - own).T for own, seen in zip(tuned, inputs, strict=True)]
        total = torch.cat(off).square().mean()
        total.backward()
        return total

    descent.step(loss)
    found = base + fused(pairs, inputs, EXACT).dense()
    torch.testing.assert_close(found, weight.detach(), rtol=1e-4, atol=1e-4)


def test_inputs_may_stream_by_in_parts() -> None:
    _, pairs, inputs = concepts(2)
    parted = Fusion(pairs)
    for place, seen in enumerate(inputs):
        parted.observe(place, seen[:14])
        parted.observe(place, seen[14:].view(4, 4, WIDTH))
    torch.testing.assert_close(parted.merged().dense(), fused(pairs, inputs).dense())


def test_of_a_convolution_the_patches_under_its_kernel_are_the_inputs() -> None:
    torch.manual_seed(1)
    pairs = [LowRank(torch.randn(OUT, RANK), torch.randn(RANK, 2, 2, 2)) for _ in range(2)]
    flat = [LowRank(pair.up, pair.down.flatten(1)) for pair in pairs]
    inputs = [torch.randn(30, 8) for _ in range(2)]
    found = fused(pairs, inputs)
    assert found.down.shape[1:] == (2, 2, 2)
    torch.testing.assert_close(found.dense().flatten(1), fused(flat, inputs).dense())


def test_concepts_that_never_meet_keep_their_outputs_and_the_rest_is_as_in_the_sum() -> None:
    base, pairs, _ = concepts(2)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0].T
    inputs = [basis[:3], basis[3:6]]
    found = base + fused(pairs, inputs, EXACT).dense()
    tuned = [base + pair.dense() for pair in pairs]
    plain_sum = base + pairs[0].dense() + pairs[1].dense()
    for seen, weight in [*zip(inputs, tuned, strict=True), (basis[6:], plain_sum)]:
        torch.testing.assert_close(seen @ found.T, seen @ weight.T, rtol=1e-5, atol=1e-5)


def test_different_answers_to_nearly_the_same_inputs_make_no_large_weights() -> None:
    _, pairs, [inputs, _] = concepts(2, tokens=2)
    alike = [inputs, inputs + 1e-2 * torch.randn_like(inputs)]
    plain_sum = (pairs[0].dense() + pairs[1].dense()).norm()
    assert fused(pairs, alike, EXACT).dense().norm() > 3 * plain_sum
    assert fused(pairs, alike).dense().norm() < 1.1 * plain_sum


def test_one_concept_alone_is_left_as_it_is() -> None:
    _, [pair], [inputs] = concepts(1)
    torch.testing.assert_close(fused([pair], [inputs]).dense(), pair.dense())


def test_a_concept_without_inputs_is_refused() -> None:
    _, pairs, inputs = concepts(2)
    with pytest.raises(ValueError, match=r"\[1\] were not observed"):
        fused(pairs, inputs[:1])


def test_what_hears_nothing_but_silence_is_the_plain_sum() -> None:
    _, pairs, inputs = concepts(2)
    whole = fused(pairs, [torch.zeros_like(each) for each in inputs]).dense()
    torch.testing.assert_close(whole, pairs[0].dense() + pairs[1].dense())
