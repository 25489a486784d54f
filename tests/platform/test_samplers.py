import pytest

from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import FLOW_SAMPLERS, SAMPLERS, check_sampler, make_sampler

BASE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_has_the_noise_schedule_of_the_base(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    sampler = make_sampler(name, BASE)
    assert type(sampler) is getattr(diffusers, SAMPLERS[name][0])
    assert sampler.config.prediction_type == "v_prediction"
    expected = diffusers.DDIMScheduler.from_config(BASE).alphas_cumprod
    assert sampler.alphas_cumprod.equal(expected)
    assert make_sampler(name, BASE) is not sampler


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_flow_is_followed_to_where_it_leads(name: str) -> None:
    """Asked for the velocity towards one picture, from any noise the sampler arrives there."""
    torch = pytest.importorskip("torch")
    sampler = make_sampler(name, {"num_train_timesteps": 1000, "shift": 3.0})
    sampler.set_timesteps(12)
    torch.manual_seed(0)
    goal, latents = torch.randn(2, 1, 4, 8, 8)
    assert sampler.init_noise_sigma == 1
    for timestep in sampler.timesteps:
        sigma = float(timestep) / 1000
        velocity = (latents - goal) / sigma  # x_t = (1 - s) x_0 + s e, so e - x_0 is this
        latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, goal, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(FLOW_SAMPLERS)))
def test_a_sampler_that_cannot_follow_a_flow_names_those_that_can(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"use dpmsolver\+\+ or unipc"):
        make_sampler(name, {"num_train_timesteps": 1000, "shift": 1.0})


def test_an_unknown_sampler_is_refused_naming_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"ddim, ddpm, dpmsolver\+\+, euler, unipc") as caught:
        check_sampler("magic", "config.prior.sampler")
    assert caught.value.fields[0].path == "config.prior.sampler"
