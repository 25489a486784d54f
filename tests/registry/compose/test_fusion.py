"""Gradient fusion against NumPy's least squares and against the descent that it replaces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lookalike_registry.compose.fusion import RIDGE, fuse, gram

OUT, WIDTH = 6, 10


def concepts(count: int, tokens: int = 30) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """W0, each concept's weights and its inputs [tokens, in], float64."""
    torch.manual_seed(0)
    base = torch.randn(OUT, WIDTH, dtype=torch.float64)
    tuned = [base + 0.3 * torch.randn_like(base) for _ in range(count)]
    inputs = [torch.randn(tokens, WIDTH, dtype=torch.float64) for _ in range(count)]
    return base, tuned, inputs


@pytest.mark.parametrize("tokens", [30, 2])
def test_fusion_is_the_ridge_regression_of_all_concepts_outputs(tokens: int) -> None:
    base, tuned, inputs = concepts(3, tokens)
    rows = torch.cat(inputs).numpy()
    pairs = zip(tuned, inputs, strict=True)
    outputs = torch.cat([seen @ weight.T for weight, seen in pairs]).numpy()
    ridge = np.sqrt(RIDGE * (rows**2).sum() / WIDTH)
    rows = np.vstack([rows, ridge * np.eye(WIDTH)])
    outputs = np.vstack([outputs, ridge * base.numpy().T])
    expected = np.linalg.lstsq(rows, outputs)[0].T
    found = fuse(base, tuned, [gram(seen) for seen in inputs])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_the_published_descent_ends_where_the_formula_does() -> None:
    base, tuned, inputs = concepts(3)
    weight = base.clone().requires_grad_()
    descent = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        off = [seen @ (weight - own).T for own, seen in zip(tuned, inputs, strict=True)]
        total = torch.cat(off).square().mean()
        total.backward()
        return total

    descent.step(loss)
    found = fuse(base, tuned, [gram(seen) for seen in inputs])
    torch.testing.assert_close(found, weight.detach(), rtol=1e-4, atol=1e-4)


def test_inputs_may_stream_by_in_parts() -> None:
    _, _, [inputs] = concepts(1)
    torch.testing.assert_close(gram(inputs[:13]) + gram(inputs[13:]), gram(inputs))
    torch.testing.assert_close(gram(inputs.view(5, 6, WIDTH)), gram(inputs))


def test_concepts_that_never_meet_keep_their_outputs_and_the_rest_stays() -> None:
    base, tuned, _ = concepts(2)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0].T
    inputs = [basis[:3], basis[3:6]]
    found = fuse(base, tuned, [gram(seen) for seen in inputs])
    for seen, weight in [*zip(inputs, tuned, strict=True), (basis[6:], base)]:
        torch.testing.assert_close(seen @ found.T, seen @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_concept_without_inputs_is_refused() -> None:
    base, tuned, inputs = concepts(2)
    with pytest.raises(ValueError, match="zip"):
        fuse(base, tuned, [gram(inputs[0])])
