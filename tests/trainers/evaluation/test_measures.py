"""Each measure against its definition, written out as loops over pairs."""

import numpy
import pytest
import torch

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.evaluation.measures import (
    bootstrap,
    diversity,
    prior_drift,
    prompt_fidelity,
    resemblance,
    subject_fidelity,
)


def features(seed: int, n: int) -> torch.Tensor:
    return torch.randn((n, 7), generator=torch.Generator().manual_seed(seed)) + 0.5


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    return float(numpy.dot(x, y) / (numpy.linalg.norm(x) * numpy.linalg.norm(y)))


@pytest.mark.parametrize("measure", [subject_fidelity, prior_drift])
def test_pictures_are_compared_with_every_real_photo(measure: object) -> None:
    generated, real = features(1, 4), features(2, 3)
    pairs = [cosine(g, r) for g in generated for r in real]
    assert callable(measure)
    assert float(measure(generated, real).mean()) == pytest.approx(numpy.mean(pairs), rel=1e-12)


def test_a_picture_is_compared_with_its_own_prompt_alone() -> None:
    images, prompts = features(3, 5), features(4, 5)
    own = [cosine(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert prompt_fidelity(images, prompts).tolist() == pytest.approx(own, rel=1e-12)


def test_diversity_is_the_mean_distance_of_pairs_of_different_pictures() -> None:
    images = features(5, 4)
    distances = [1 - cosine(images[i], images[j]) for i in range(4) for j in range(i)]
    assert diversity(images) == pytest.approx(numpy.mean(distances), rel=1e-12)


def test_equal_pictures_have_no_diversity() -> None:
    assert diversity(features(6, 1).expand(3, -1)) == pytest.approx(0, abs=1e-12)


def test_a_photo_resembles_the_others_and_is_not_compared_with_itself() -> None:
    photos = features(7, 3)
    others = [
        numpy.mean([cosine(photos[i], photos[j]) for j in range(3) if j != i]) for i in range(3)
    ]
    assert resemblance(photos).tolist() == pytest.approx(others, rel=1e-12)


def test_one_picture_has_no_diversity_to_measure() -> None:
    with pytest.raises(InvalidRequest, match="two"):
        diversity(features(8, 1))


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = numpy.random.default_rng(0).normal(0.6, 0.1, 40)
    ours = bootstrap(values.tolist(), resamples=20_000)
    theirs = stats.bootstrap(
        (values,), numpy.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_the_interval_is_the_same_each_time_and_a_single_value_has_none() -> None:
    assert bootstrap([0.1, 0.5, 0.9]) == bootstrap([0.1, 0.5, 0.9])
    alone = bootstrap([0.4])
    assert (alone.mean, alone.low, alone.high, alone.count) == (0.4, None, None, 1)


def test_no_values_have_no_mean() -> None:
    with pytest.raises(InvalidRequest):
        bootstrap([])
