import pytest

from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import (
    FLOW_SAMPLERS,
    NEEDS_SIGNAL,
    SAMPLERS,
    check_sampler,
    check_steps,
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


@pytest.mark.parametrize(
    ("own", "steps", "range_"),
    [
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 100}, 101, "1 to 100"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 20}, 21, "1 to 20"),
        ({"_class_name": "TCDScheduler"}, 51, "1 to 50"),
        ({"_class_name": "PNDMScheduler"}, 3, "4 to 1000"),
    ],
)
def test_more_or_fewer_steps_than_a_scheduler_can_make_are_refused(
    own: dict[str, object], steps: int, range_: str
) -> None:
    """As diffusers refuses them, only later and without saying what to do."""
    with pytest.raises(InvalidRequest) as caught:
        check_steps("base", BASE | own, steps)
    (problem,) = caught.value.fields
    assert problem.path == "steps"
    assert range_ in problem.message
    with pytest.raises(ValueError, match=r"num_inference_steps|operands"):
        make_sampler("base", BASE | own).set_timesteps(steps)
    nearest = steps - 1 if steps > 3 else steps + 1
    check_steps("base", BASE | own, nearest)
    make_sampler("base", BASE | own).set_timesteps(nearest)


def test_pndm_with_its_runge_kutta_start_is_not_begun_late() -> None:
    own = BASE | {"_class_name": "PNDMScheduler"}
    with pytest.raises(InvalidRequest) as caught:
        check_steps("base", own, 25, from_noise=False)
    assert [problem.path for problem in caught.value.fields] == ["sampler"]
    check_steps("base", own, 25)
    check_steps("pndm", own, 25, from_noise=False)
    check_steps("base", own | {"skip_prk_steps": True}, 25, from_noise=False)
