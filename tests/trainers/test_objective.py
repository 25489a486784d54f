"""The loss and its gradient against the formulas of the papers, written out in float64."""

from types import SimpleNamespace

import pytest
import torch

from lookalike_platform.errors import CapabilityMissing
from lookalike_trainers.objective import NoiseSchedule, weighted_mse

T = 50
ALPHAS = torch.linspace(0.999, 0.01, T, dtype=torch.float64)
SIGMAS = torch.linspace(0.02, 1, T, dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 7, 23, 49])


def schedule(prediction_type: str) -> NoiseSchedule:
    if prediction_type == "flow_prediction":
        return NoiseSchedule.flow(SIGMAS)
    return NoiseSchedule.diffusion(ALPHAS, prediction_type)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise [4, 2, 3, 3]."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 4, 2, 3, 3), generator=generator, dtype=torch.float64)
    return latents, noise


def test_noise_is_added_as_ho_et_al_do(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    noisy = schedule("epsilon").noised(latents, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        expected = ALPHAS[t] ** 0.5 * latents[i] + (1 - ALPHAS[t]) ** 0.5 * noise[i]
        torch.testing.assert_close(noisy[i], expected)


def test_the_target_is_the_noise_or_the_velocity(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = batch
    assert torch.equal(schedule("epsilon").target(latents, noise, TIMESTEPS), noise)
    velocity = schedule("v_prediction").target(latents, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        expected = ALPHAS[t] ** 0.5 * noise[i] - (1 - ALPHAS[t]) ** 0.5 * latents[i]
        torch.testing.assert_close(velocity[i], expected)


def test_a_flow_bases_noise_and_target_are_those_of_its_own_scheduler(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Lipman et al. 2023, as diffusers' scheduler noises: x_t = (1 - s) x_0 + s e."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = NoiseSchedule.of(scheduler)
    latents, noise = batch
    numbers = torch.tensor([0, 300, 700, 999])
    told = flow.times[numbers]
    expected = scheduler.scale_noise(latents, scheduler.timesteps.flip(0)[numbers], noise)
    torch.testing.assert_close(flow.noised(latents, noise, numbers), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told, scheduler.timesteps.flip(0)[numbers])
    target = flow.target(latents, noise, numbers)
    # One Euler step from x_t along the target, of -sigma, arrives at x_0.
    sigma = told.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(expected - sigma * target, latents, rtol=1e-5, atol=1e-5)


def test_flow_weights_make_an_error_of_the_clean_latents_count_as_hang_et_al_do() -> None:
    """The error of x_0 is sigma times the target's: min(SNR, gamma) sigma^2 in all."""
    weights = schedule("flow_prediction").weight(TIMESTEPS, gamma=5.0)
    for i, t in enumerate(TIMESTEPS):
        snr = ((1 - SIGMAS[t]) / SIGMAS[t]) ** 2
        torch.testing.assert_close(weights[i], min(snr, torch.tensor(5.0)) * SIGMAS[t] ** 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_hang_et_al(prediction_type: str) -> None:
    weights = schedule(prediction_type).weight(TIMESTEPS, gamma=5.0)
    for i, t in enumerate(TIMESTEPS):
        snr = ALPHAS[t] / (1 - ALPHAS[t])
        divisor = snr if prediction_type == "epsilon" else snr + 1
        torch.testing.assert_close(weights[i], min(snr, torch.tensor(5.0)) / divisor)


def test_without_gamma_every_sample_weighs_the_same() -> None:
    assert schedule("epsilon").weight(TIMESTEPS, gamma=None).tolist() == [1, 1, 1, 1]


def test_a_last_step_without_signal_weighs_nothing_instead_of_nan() -> None:
    """Schedules rescaled to zero terminal SNR end there (Lin et al. 2024)."""
    rescaled = NoiseSchedule.diffusion(torch.tensor([0.9, 0.0]), "v_prediction")
    assert rescaled.weight(torch.tensor([1]), gamma=5.0).tolist() == [0]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_weigh_both_terms_sample_by_sample(
    prediction_type: str, gamma: float | None
) -> None:
    """Ruiz et al. 2023, eq. 2, with min-SNR inside both means: 2 photos, 3 class images."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn((2, 5, 2, 3, 3), generator=generator, dtype=torch.float64)
    timesteps, prior_weight = torch.tensor([3, 40, 11, 0, 49]), 0.7
    base = torch.tensor([1 / 2] * 2 + [prior_weight / 3] * 3, dtype=torch.float64)
    weight = base * schedule(prediction_type).weight(timesteps, gamma)
    prediction.requires_grad_()
    loss = weighted_mse(prediction, target, weight)
    loss.backward()

    snr = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    divisor = snr if prediction_type == "epsilon" else snr + 1
    w = torch.ones(5) if gamma is None else snr.clamp(max=gamma) / divisor
    error = (prediction.detach() - target) ** 2
    instance = sum(w[i] * error[i].mean() for i in (0, 1)) / 2
    prior = sum(w[i] * error[i].mean() for i in (2, 3, 4)) / 3
    whole = torch.as_tensor(instance + prior_weight * prior)
    torch.testing.assert_close(loss, whole, rtol=1e-10, atol=0)

    slope = 2 * (prediction.detach() - target) / error[0].numel()
    expected = torch.stack([base[i] * w[i] * slope[i] for i in range(5)])
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-10, atol=1e-14)


def test_a_masked_error_is_the_mean_over_what_the_mask_shows() -> None:
    """Kumari et al. 2023: sum(m e) / sum(m), here of each sample and weighed as without a mask."""
    generator = torch.Generator().manual_seed(2)
    prediction, target = torch.randn((2, 3, 2, 4, 4), generator=generator, dtype=torch.float64)
    mask = torch.rand((3, 1, 4, 4), generator=generator, dtype=torch.float64).round()
    mask[1] = 1
    weight = torch.tensor([0.5, 0.2, 2.0], dtype=torch.float64)
    loss = weighted_mse(prediction, target, weight, mask)
    expected = 0.0
    for i in range(3):
        shown = [
            float(prediction[i, c, y, x] - target[i, c, y, x]) ** 2
            for c in range(2)
            for y in range(4)
            for x in range(4)
            if mask[i, 0, y, x]
        ]
        expected += float(weight[i]) * sum(shown) / len(shown)
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    whole = weighted_mse(prediction, target, weight, torch.ones_like(mask))
    torch.testing.assert_close(whole, weighted_mse(prediction, target, weight))


def test_a_sample_of_which_the_mask_shows_nothing_has_no_error() -> None:
    prediction = torch.ones(1, 2, 3, 3, requires_grad=True)
    empty = torch.zeros(1, 1, 3, 3)
    loss = weighted_mse(prediction, torch.zeros(1, 2, 3, 3), torch.ones(1), empty)
    loss.backward()
    assert loss == 0
    assert prediction.grad is not None
    assert prediction.grad.count_nonzero() == 0


def test_a_prediction_type_that_is_not_known_is_refused_by_name() -> None:
    scheduler = SimpleNamespace(
        config=SimpleNamespace(prediction_type="sample"), alphas_cumprod=ALPHAS
    )
    with pytest.raises(CapabilityMissing, match="'sample'"):
        NoiseSchedule.of(scheduler)
