import pytest

from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import (
    FLOW_SAMPLERS,
    NEEDS_SIGNAL,
    SAMPLERS,
    check_sampler,
    make_sampler,
)
from support_sampling import LIBRARY_WARNINGS

pytestmark = LIBRARY_WARNINGS

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
    assert type(sampler).__name__ == (SAMPLERS[name][0] or BASE["_class_name"])
    assert sampler.config.prediction_type == "v_prediction"
    expected = diffusers.DDIMScheduler.from_config(BASE).alphas_cumprod
    assert sampler.alphas_cumprod.equal(expected)
    assert make_sampler(name, BASE) is not sampler


def test_the_bases_own_sampler_has_all_of_its_options() -> None:
    diffusers = pytest.importorskip("diffusers")
    own = {"_class_name": "LCMScheduler", "original_inference_steps": 20, "beta_start": 0.001}
    sampler = make_sampler("base", own)
    assert type(sampler) is diffusers.LCMScheduler
    assert sampler.config.original_inference_steps == 20
    assert sampler.config.beta_start == 0.001


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(FLOW_SAMPLERS)))
def test_a_sampler_that_cannot_follow_a_flow_names_those_that_can(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_sampler(name, {"num_train_timesteps": 1000, "shift": 1.0})
    *others, last = FLOW_SAMPLERS
    assert f"{name} cannot sample this flow" in str(caught.value)
    assert f"use {', '.join(others)} or {last}" in str(caught.value)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_need_a_signal_to_begin_with_refuse_a_base_that_has_none(name: str) -> None:
    silent = BASE | {"rescale_betas_zero_snr": True}
    if name in NEEDS_SIGNAL:
        with pytest.raises(InvalidRequest, match=rf"{name} cannot begin .* use base, ddim, "):
            make_sampler(name, silent)
    else:
        assert make_sampler(name, silent).config.rescale_betas_zero_snr


def test_an_unknown_sampler_is_refused_naming_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"ddim, ddpm, dpmsolver\+\+1, .*, unipc") as caught:
        check_sampler("magic", "config.prior.sampler")
    assert caught.value.fields[0].path == "config.prior.sampler"
