"""Walks from noise to latents, against where they must lead and against diffusers' pipelines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lookalike_platform.conditioning import Text
from lookalike_platform.diffusion import noise, walk_on
from lookalike_platform.guidance import Guidance
from lookalike_platform.samplers import FLOW_SAMPLERS, SAMPLERS, make_sampler, scheduler_of
from lookalike_platform.steps import answers_of, steps_made
from lookalike_platform.walk import Start, Walk
from support_models import save_base
from support_sampling import LIBRARY_WARNINGS

pytestmark = LIBRARY_WARNINGS

SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
UNGUIDED = Guidance(scale=1.0)

KINDS = [
    *((name, kind) for name in SAMPLERS for kind in ("epsilon", "v_prediction")),
    *((name, "flow_prediction") for name in FLOW_SAMPLERS),
]


def config_of(kind: str) -> dict[str, Any]:
    return FLOW if kind == "flow_prediction" else SCHEDULE | {"prediction_type": kind}


def knowing(goal: torch.Tensor, kind: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The denoiser that has learned nothing but one picture."""
    shares = make_sampler("ddim", SCHEDULE).alphas_cumprod

    def predict(seen: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        time = timesteps.view(-1, 1, 1, 1)
        if kind == "flow_prediction":
            return (seen - goal) / (time / 1000)
        alpha, sigma = shares[time.long()].sqrt(), (1 - shares[time.long()]).sqrt()
        error = (seen - alpha * goal) / sigma
        return error if kind == "epsilon" else alpha * error - sigma * goal

    return predict


def coarseness(name: str) -> float:
    """How far from the picture a walk may end: Euler's steps of the probability flow are coarse,
    and those that follow sigmas end at the schedule's smallest."""
    return 0.6 if name == "probability_flow" else 0.02


def go(walk: Walk, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    while not walk.done:
        walk.answer(predict(*walk.ask()))
    return walk.latents


@pytest.mark.parametrize("strength", [None, 1.0, 0.6, 0.3])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_sampler_arrives_where_the_denoiser_points(
    name: str, kind: str, strength: float | None
) -> None:
    """From noise, and from another picture in the middle of the way."""
    drawn, generators = noise([1, 2], 4, 8, 8)
    goal, other = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = Start(other, strength) if strength else None
    sampler = make_sampler(name, config_of(kind))
    walk = Walk(sampler, drawn, generators, steps=20, guidance=UNGUIDED, start=start)
    found = go(walk, knowing(goal, kind))
    torch.testing.assert_close(found, goal, rtol=0, atol=coarseness(name))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_inpainting_paints_inside_the_mask_and_leaves_the_rest_as_it_was(
    name: str, kind: str
) -> None:
    drawn, generators = noise([1, 2], 4, 8, 8)
    goal, known = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6] = 1
    walk = Walk(
        make_sampler(name, config_of(kind)),
        drawn,
        generators,
        steps=20,
        guidance=UNGUIDED,
        start=Start(known, 0.8, mask),
    )
    found = go(walk, knowing(goal, kind))
    assert found[..., :2].equal(known[..., :2])
    assert found[..., 6:].equal(known[..., 6:])
    torch.testing.assert_close(found[..., 2:6], goal[..., 2:6], rtol=0, atol=coarseness(name))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random base that predicts epsilon, and one that predicts v."""
    folder = save_base(tmp_path_factory.mktemp("base"), request.param)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(pipeline: Any) -> tuple[Text, Text]:
    with torch.no_grad():
        text, blank = pipeline.encode_prompt("a dog", "cpu", 1, True, negative_prompt="blue")
    return Text(text), Text(blank)


@torch.no_grad()
def ours(pipeline: Any, name: str, guidance: Guidance, steps: int, **options: Any) -> torch.Tensor:
    drawn, generators = noise([3, 4], 4, 16, 16)
    sampler = make_sampler(name, dict(pipeline.scheduler.config))
    walk = Walk(sampler, drawn, generators, steps=steps, guidance=guidance, **options)
    return walk_on(walk, pipeline.unet, *texts(pipeline))


def theirs(pipeline: Any, name: str, steps: int, **options: Any) -> torch.Tensor:
    scheduler = make_sampler(name, dict(pipeline.scheduler.config))
    plain = type(pipeline)(**pipeline.components | {"scheduler": scheduler})
    plain.set_progress_bar_config(disable=True)
    drawn, generators = noise([3, 4], 4, 16, 16)
    latents: torch.Tensor = plain(
        ["a dog"] * 2,
        negative_prompt=["blue"] * 2,
        num_inference_steps=steps,
        latents=drawn,
        generator=generators,
        output_type="latent",
        **options,
    ).images
    return latents


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_those_of_diffusers(pipeline: Any, name: str, steps: int) -> None:
    torch.testing.assert_close(
        ours(pipeline, name, Guidance(scale=5.0), steps),
        theirs(pipeline, name, steps, guidance_scale=5.0),
    )


OWN: list[dict[str, Any]] = [
    {"_class_name": "PNDMScheduler", "skip_prk_steps": False},  # diffusers' default
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    {"_class_name": "TCDScheduler"},  # whose own eta is not 0
    {"_class_name": "LCMScheduler"},
    {"_class_name": "KDPM2DiscreteScheduler"},
    {"_class_name": "KDPM2AncestralDiscreteScheduler"},
    {"_class_name": "DEISMultistepScheduler"},
    {"_class_name": "LMSDiscreteScheduler"},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(map(str, own.values())))
def test_a_bases_own_scheduler_is_walked_as_diffusers_walks_it(
    pipeline: Any, own: dict[str, Any]
) -> None:
    config = dict(pipeline.scheduler.config) | own
    drawn, generators = noise([3, 4], 4, 16, 16)
    walk = Walk(
        make_sampler("base", config), drawn, generators, steps=7, guidance=Guidance(scale=5.0)
    )
    assert walk.total == answers_of(*scheduler_of("base", config), 7)
    other = type(pipeline)(**pipeline.components | {"scheduler": make_sampler("base", config)})
    with torch.no_grad():
        found = walk_on(walk, other.unet, *texts(pipeline))
    torch.testing.assert_close(found, theirs(other, "base", 7, guidance_scale=5.0))


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_thresholds_know_the_noise_between_two_steps_of_second_order(name: str) -> None:
    drawn, generators = noise([1], 4, 8, 8)
    goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = config_of("epsilon") | {"_class_name": name}
    walk = Walk(make_sampler("base", config), drawn, generators, steps=8, guidance=UNGUIDED)
    while not walk.done:
        seen, timesteps = walk.ask()
        predicted = knowing(goal, "epsilon")(seen, timesteps)
        torch.testing.assert_close(walk._level().clean(seen, predicted), goal, rtol=0, atol=0.1)
        walk.answer(predicted)


def test_rescaled_guidance_is_that_of_diffusers(pipeline: Any) -> None:
    torch.testing.assert_close(
        ours(pipeline, "euler", Guidance(scale=8.0, rescale=0.7), 5),
        theirs(pipeline, "euler", 5, guidance_scale=8.0, guidance_rescale=0.7),
    )


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_eta_is_that_of_diffusers(pipeline: Any, eta: float) -> None:
    with_noise = ours(pipeline, "ddim", Guidance(scale=5.0), 5, eta=eta)
    torch.testing.assert_close(with_noise, theirs(pipeline, "ddim", 5, guidance_scale=5.0, eta=eta))
    assert not with_noise.equal(ours(pipeline, "ddim", Guidance(scale=5.0), 5))


def test_ddim_with_an_eta_of_1_is_ddpms_posterior() -> None:
    """Ho et al. 2020, eq. 7: each step draws from q(x_s | x_t, x0) (Song et al. 2021, sec. 4.1)."""
    drawn, generators = noise([5], 4, 8, 8)
    goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = config_of("epsilon")
    walk = Walk(
        make_sampler("ddim", schedule), drawn, generators, steps=4, guidance=UNGUIDED, eta=1.0
    )
    found = go(walk, knowing(goal, "epsilon"))

    shares = make_sampler("ddim", schedule).alphas_cumprod
    x, (_, draws) = drawn, noise([5], 4, 8, 8)
    for now, before in ((751, 501), (501, 251), (251, 1), (1, None)):
        a, b = shares[now], torch.tensor(1.0) if before is None else shares[before]
        step = a / b  # the alpha of the step itself
        mean = b.sqrt() * (1 - step) / (1 - a) * goal + step.sqrt() * (1 - b) / (1 - a) * x
        deviation = ((1 - b) / (1 - a) * (1 - step)).sqrt()
        x = mean + deviation * torch.randn(x.shape, generator=draws[0])
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_probability_flow_is_integrated_as_the_equation_says(kind: str) -> None:
    """dx = -1/2 beta (x + score) dt, by Euler's steps over the thousand betas one by one."""
    drawn, generators = noise([5], 4, 8, 8)
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = config_of(kind)
    walk = Walk(
        make_sampler("probability_flow", schedule | {"steps_offset": 0}),
        drawn,
        generators,
        steps=1000,
        guidance=UNGUIDED,
    )
    found = go(walk, knowing(target, kind))

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    left = torch.cumprod(1 - betas, 0)
    x = drawn
    for t in reversed(range(1000)):
        score = -(x - left[t].sqrt() * target) / (1 - left[t])
        x = x + 0.5 * betas[t] * (x + score)
    torch.testing.assert_close(found, x, rtol=0.02, atol=0.02)


def test_the_probability_flow_nears_ddim_as_steps_grow(pipeline: Any) -> None:
    """Both integrate the same equation."""

    def apart(steps: int) -> float:
        flowed = ours(pipeline, "probability_flow", UNGUIDED, steps)
        return float((flowed - ours(pipeline, "ddim", UNGUIDED, steps)).norm())

    assert apart(80) < apart(20) / 3


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "pndm"])
def test_an_interval_guides_only_its_share_of_the_steps(pipeline: Any, name: str) -> None:
    sampler = make_sampler(name, dict(pipeline.scheduler.config))
    guidance = Guidance(scale=5.0, interval=(0.25, 0.5))
    walk = Walk(sampler, *noise([3, 4], 4, 16, 16), steps=8, guidance=guidance)
    guided = []
    while not walk.done:
        guided.append(walk.guided)
        walk.answer(walk.latents, walk.latents if walk.guided else None)
    visits = len(guided)
    assert guided == [visits // 4 <= visit < visits // 2 for visit in range(visits)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("strength", [None, 0.75, 0.25])
def test_how_often_the_denoiser_is_asked_is_known_beforehand(
    name: str, kind: str, strength: float | None
) -> None:
    """What requests are refused by is what the walk does."""
    drawn, generators = noise([1], 4, 8, 8)
    start = None if strength is None else Start(torch.zeros_like(drawn), strength)
    made = 4 if strength is None else steps_made(4, strength)
    sampler = make_sampler(name, config_of(kind))
    walk = Walk(sampler, drawn, generators, steps=4, guidance=UNGUIDED, start=start)
    assert walk.total == answers_of(*scheduler_of(name, config_of(kind)), made)


def test_an_interval_counts_steps_from_noise_also_where_a_picture_skips_some() -> None:
    drawn, generators = noise([1], 4, 8, 8)
    guidance = Guidance(scale=5.0, interval=(0.0, 0.7))
    start = Start(torch.zeros_like(drawn), strength=0.5)
    sampler = make_sampler("ddim", config_of("epsilon"))
    walk = Walk(sampler, drawn, generators, steps=10, guidance=guidance, start=start)
    guided = []
    while not walk.done:
        guided.append(walk.guided)
        walk.answer(walk.latents, walk.latents if walk.guided else None)
    assert guided == [True, True, False, False, False]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_thresholding_acts_on_the_picture_that_the_prediction_means(name: str, kind: str) -> None:
    """Guided towards twice a picture, whatever the sampler, x0 is held in the picture's range."""
    drawn, generators = noise([1], 4, 8, 8)
    goal = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(goal)
    guidance = Guidance(scale=2.0, threshold=1.0)
    sampler = make_sampler(name, config_of(kind))
    walk = Walk(sampler, drawn, generators, steps=20, guidance=guidance)
    while not walk.done:
        asked = walk.ask()
        walk.answer(knowing(goal, kind)(*asked), knowing(nothing, kind)(*asked))
    # x0 = 2 goal, clipped to its own largest value 2 r and brought to r, is goal.
    torch.testing.assert_close(walk.latents, goal, rtol=0, atol=coarseness(name))
