"""Guidance against formulas written out, and diffusers' own."""

from typing import get_args

import numpy
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
)

from lookalike_platform.guidance import (
    Guidance,
    Level,
    PredictionType,
    guide,
    rescale,
    threshold,
)

SHAPE = (3, 4, 8, 8)


@pytest.fixture
def two() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *SHAPE, generator=generator)
    return first, second


def test_guidance_goes_past_the_conditional_prediction(
    two: tuple[torch.Tensor, torch.Tensor],
) -> None:
    unconditional, conditional = two
    assert guide(unconditional, conditional, 0.0).equal(unconditional)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(
        guide(unconditional, conditional, 3.0), 3 * conditional - 2 * unconditional
    )


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(two: tuple[torch.Tensor, torch.Tensor], phi: float) -> None:
    conditional, other = two
    guided = conditional + 6 * other
    theirs = rescale_noise_cfg(guided, conditional, phi)
    torch.testing.assert_close(rescale(guided, conditional, phi), theirs)
    if phi == 1:
        spread = rescale(guided, conditional, phi).std((1, 2, 3))
        torch.testing.assert_close(spread, conditional.std((1, 2, 3)))


def test_thresholding_is_imagens_with_the_range_of_the_unguided_prediction(
    two: tuple[torch.Tensor, torch.Tensor],
) -> None:
    conditional, other = two
    guided = conditional + 6 * other
    guided[2] = conditional[2] / 2  # nothing sticks out
    held = threshold(guided, conditional, 0.9)
    for picture, meant, found in zip(
        guided.numpy(), conditional.numpy(), held.numpy(), strict=True
    ):
        data_range = numpy.quantile(abs(meant), 0.9)
        limit = max(numpy.quantile(abs(picture), 0.9), data_range)
        numpy.testing.assert_allclose(
            found, numpy.clip(picture, -limit, limit) / limit * data_range, rtol=1e-5
        )
    assert held[2].equal(guided[2].clamp(-held[2].abs().max(), held[2].abs().max()))


def test_thresholding_of_pixels_is_imagens_own() -> None:
    """Where the unguided prediction reaches to 1, as pixels do, r is Imagen's 1."""
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    extremes = torch.ones_like(pixels)
    limit = pixels.flatten(1).abs().quantile(0.95, dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        threshold(pixels, extremes, 0.95), pixels.clamp(-limit, limit) / limit
    )


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_a_prediction_means_the_picture_that_was_noised(
    two: tuple[torch.Tensor, torch.Tensor], kind: PredictionType
) -> None:
    clean, noise = two
    alpha, sigma = (0.6, 0.4) if kind == "flow_prediction" else (0.6, 0.8)
    noisy = alpha * clean + sigma * noise
    said = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "flow_prediction": noise - clean,
        "sample": clean,
    }[kind]
    level = Level(alpha, sigma, kind)
    torch.testing.assert_close(level.clean(noisy, said), clean)
    torch.testing.assert_close(level.predicted(noisy, clean), said)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.0, 1.0), range(10)), ((0.2, 0.8), range(2, 8)), ((0.0, 0.5), range(5)), ((1.0, 1.0), [])],
)
def test_an_interval_is_a_share_of_the_way(
    interval: tuple[float, float], expected: list[int]
) -> None:
    guidance = Guidance(scale=4.0, interval=interval)
    assert [step for step in range(10) if guidance.acts(step, 10)] == list(expected)


def test_a_scale_of_1_needs_no_unconditional_prediction() -> None:
    assert not Guidance(scale=1.0).acts(3, 10)
