"""Custom Diffusion's closed form against solvers that know the problem, not the formula."""

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lookalike_registry.compose.closed_form import ConceptWords, TextStatistics

OUT, WIDTH = 5, 12


def problem(
    words: Sequence[int], *, captions: int = 60, out: int = OUT, width: int = WIDTH, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Captions' features, W0, each concept's features and its tuned weights, float64."""
    torch.manual_seed(seed)
    base = torch.randn(out, width, dtype=torch.float64)
    features = [torch.randn(count, width, dtype=torch.float64) for count in words]
    tuned = [base + 0.3 * torch.randn_like(base) for _ in words]
    return torch.randn(captions, width, dtype=torch.float64), base, features, tuned


def merge(captions: Tensor, base: Tensor, features: list[Tensor], tuned: list[Tensor]) -> Tensor:
    return ConceptWords.of(TextStatistics.of(captions), features).merge_layer(base, tuned)


def outputs(features: list[Tensor], tuned: list[Tensor]) -> Tensor:
    """V* [tokens, out]: what each concept's own weights answer to its own words."""
    return torch.cat([words @ weight.T for words, weight in zip(features, tuned, strict=True)])


def by_kkt(captions: Tensor, base: Tensor, features: list[Tensor], tuned: list[Tensor]) -> Tensor:
    """Lagrange's conditions of the constrained problem as one linear system, for SciPy."""
    keys, words = captions.numpy(), torch.cat(features).numpy()
    corner = np.zeros((len(words), len(words)))
    system = np.block([[2 * keys.T @ keys, words.T], [words, corner]])
    asked = outputs(features, tuned).numpy()
    right = np.vstack([2 * keys.T @ keys @ base.numpy().T, asked])
    return torch.from_numpy(scipy.linalg.lstsq(system, right)[0][: base.shape[1]].T)


@pytest.mark.parametrize("words", [[1], [3, 2], [2, 2, 2, 2]])
def test_the_merge_solves_the_constrained_problem(words: list[int]) -> None:
    given = problem(words)
    torch.testing.assert_close(merge(*given), by_kkt(*given), rtol=1e-6, atol=1e-6)


def test_no_iterative_solver_finds_a_better_merge() -> None:
    captions, base, features, tuned = problem([1, 2], captions=20, out=2, width=6)
    keys, words = captions.numpy(), torch.cat(features).numpy()
    asked = outputs(features, tuned).numpy()

    def drift(flat: np.ndarray) -> float:
        return float((((flat.reshape(2, 6) - base.numpy()) @ keys.T) ** 2).sum())

    def slope(flat: np.ndarray) -> np.ndarray:
        return np.asarray(2 * (flat.reshape(2, 6) - base.numpy()) @ keys.T @ keys).ravel()

    found = scipy.optimize.minimize(
        drift,
        base.numpy().ravel(),
        jac=slope,
        method="SLSQP",
        constraints={
            "type": "eq",
            "fun": lambda flat: (words @ flat.reshape(2, 6).T - asked).ravel(),
        },
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success
    ours = merge(captions, base, features, tuned)
    torch.testing.assert_close(ours, torch.from_numpy(found.x.reshape(2, 6)), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    repeated=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_words_that_depend_on_others_change_nothing(
    words: list[int], repeated: int, seed: int
) -> None:
    captions, base, features, tuned = problem(words, width=24, seed=seed)
    mixed = torch.randn(repeated, words[0], dtype=torch.float64) @ features[0]
    more = [torch.cat([features[0], mixed]), *features[1:]]
    merged = merge(captions, base, more, tuned)
    plain = merge(captions, base, features, tuned)
    torch.testing.assert_close(merged, plain, rtol=1e-6, atol=1e-6)


def test_two_concepts_at_odds_about_one_word_meet_halfway() -> None:
    captions, base, [words], [first] = problem([3])
    second = base + 0.3 * torch.randn_like(base)
    merged = merge(captions, base, [words, words.clone()], [first, second])
    torch.testing.assert_close(merged @ words.T, (first + second) @ words.T / 2)


def test_words_that_differ_by_rounding_only_are_one_word() -> None:
    captions, base, [words], [first] = problem([3])
    second = base + 0.3 * torch.randn_like(base)
    nearly = words + 1e-7 * torch.randn_like(words)
    merged = merge(captions, base, [words, nearly], [first, second])
    same = merge(captions, base, [words, words], [first, second])
    torch.testing.assert_close(merged, same, rtol=1e-5, atol=1e-5)


def test_words_that_differ_little_keep_outputs_of_their_own() -> None:
    captions, base, [words], [first] = problem([2])
    second = base + 0.3 * torch.randn_like(base)
    close = words + 1e-2 * torch.randn_like(words)
    merged = merge(captions, base, [words, close], [first, second])
    torch.testing.assert_close(
        merged @ torch.cat([words, close]).T,
        outputs([words, close], [first, second]).T,
        rtol=1e-6,
        atol=1e-6,
    )


def test_fewer_captions_than_dimensions_are_enough() -> None:
    captions, base, features, tuned = problem([2, 2], captions=4)
    merged = merge(captions, base, features, tuned)
    assert merged.isfinite().all()
    held = merged @ torch.cat(features).T
    torch.testing.assert_close(held, outputs(features, tuned).T, rtol=1e-6, atol=1e-6)


def test_a_concept_keeps_its_outputs_and_leaves_other_captions_nearly_alone() -> None:
    torch.manual_seed(0)
    frequent = torch.linspace(1, 0.02, 48)  # as in real text: few directions carry most
    captions = torch.randn(2000, 48) * frequent
    words = torch.randn(3, 48) * frequent.flip(0)
    base = torch.randn(20, 48)
    tuned = base + 0.2 * torch.randn_like(base)
    merged = merge(captions, base, [words], [tuned])
    torch.testing.assert_close(words @ merged.T, words @ tuned.T)

    def drift(weight: Tensor) -> float:
        return float((captions @ (weight - base).T).norm())

    assert drift(merged) < 0.05 * drift(tuned)


def test_half_precision_weights_come_back_in_half_precision() -> None:
    captions, base, features, tuned = problem([2, 2])
    halves = [weight.half() for weight in tuned]
    merged = merge(captions.half(), base.half(), features, halves)
    assert merged.dtype == torch.float16
    held = merged.double() @ torch.cat(features).T
    torch.testing.assert_close(held, outputs(features, tuned).T, rtol=1e-2, atol=1e-2)


def test_a_concept_without_words_is_refused() -> None:
    captions, base, features, tuned = problem([2, 2])
    with pytest.raises(ValueError, match="zip"):
        merge(captions, base, features[:1], tuned)
