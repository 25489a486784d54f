import pytest

from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import SAMPLERS, check_sampler, make_sampler

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


def test_an_unknown_sampler_is_refused_naming_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"ddim, ddpm, dpmsolver\+\+, euler, unipc") as caught:
        check_sampler("magic", "config.prior.sampler")
    assert caught.value.fields[0].path == "config.prior.sampler"
