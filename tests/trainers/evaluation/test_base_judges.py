"""The base as judge of pictures: against naive loops, and by what it can tell apart."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import lookalike_api
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.draws import generator
from lookalike_trainers.evaluation.base_classifier import OTHER_SCENES, BaseClassifier
from lookalike_trainers.evaluation.base_features import BaseFeatures, picture_latents
from lookalike_trainers.evaluation.measures import cosines, resemblance
from lookalike_trainers.evaluation.request import SCENES
from support_images import picture
from support_models import save_base

BIBO = sorted((Path(lookalike_api.__file__).parent / "demo" / "bibo").glob("*.png"))


def traffic_light(seed: int) -> Image.Image:
    """A dark box with three lamps, here and there on grounds of many colours."""
    image = picture(seed, (64, 64)).resize((2, 2)).resize((64, 64))
    draw, x = ImageDraw.Draw(image), 18 + 3 * seed
    draw.rectangle((x, 6, x + 20, 58), fill="#222222")
    for place, colour in enumerate(("red", "orange", "green")):
        draw.ellipse((x + 3, 9 + 16 * place, x + 17, 23 + 16 * place), fill=colour)
    return image


def test_photos_of_a_subject_are_closer_to_each_other_than_to_another_subjects(
    bundled_parts: BaseParts,
) -> None:
    encoder = BaseFeatures(bundled_parts)
    bibo = encoder.encode_images([Image.open(file) for file in BIBO])
    lights = encoder.encode_images([traffic_light(seed) for seed in range(6)])
    between = cosines(bibo, lights).mean()
    assert resemblance(bibo).mean() > between + 0.1
    assert resemblance(lights).mean() > between + 0.1


def test_base_features_have_length_one_and_stay_the_same(tiny_parts: BaseParts) -> None:
    photos = [picture(seed) for seed in range(3)]
    features = BaseFeatures(tiny_parts).encode_images(photos)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert torch.equal(features, BaseFeatures(tiny_parts).encode_images(photos))
    alone = BaseFeatures(tiny_parts).encode_images(photos[1:2])
    torch.testing.assert_close(features[1:2], alone)


@torch.no_grad()
def test_the_classifiers_errors_are_the_mean_squared_lengths_of_single_predictions(
    tiny_parts: BaseParts,
) -> None:
    prompts, draws = ["a dog", "a cat", "tea"], 4
    photo = picture(1)
    alphas = tiny_parts.scheduler.alphas_cumprod
    x0 = picture_latents(tiny_parts, [photo])
    expected = []
    for prompt in prompts:
        total = 0.0
        for number, t in enumerate((125, 375, 625, 875)):
            e = torch.randn(x0.shape[1:], generator=generator("classifier", number))[None]
            x_t = alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * e
            features = tiny_parts.encode([prompt], 64).features
            said = tiny_parts.unet(x_t, t, features).sample
            total += float(((said - e) ** 2).sum())
        expected.append(total / draws)
    classifier = BaseClassifier(tiny_parts, draws=draws)
    assert classifier.errors(photo, prompts).tolist() == pytest.approx(expected, rel=1e-4)
    likely = torch.softmax(-torch.tensor(expected), 0)
    assert classifier.probabilities(photo, prompts).tolist() == pytest.approx(
        likely.tolist(), rel=1e-2
    )


def test_the_bundled_base_knows_the_prompt_its_own_pictures_were_drawn_from(
    bundled_parts: BaseParts,
) -> None:
    from lookalike_platform.diffusion import decode, denoise, noise
    from lookalike_platform.samplers import make_sampler

    prompts = ["a cat on a red background", "a car on a blue background", "a tree in the snow"]
    pictures = []
    with torch.inference_mode():
        blank = bundled_parts.encode([""], 64)
        for prompt in prompts:
            latents, generators = noise([3], 4, 16, 16)
            latents = denoise(
                bundled_parts.unet,
                make_sampler("ddim", dict(bundled_parts.scheduler.config)),
                latents,
                generators,
                bundled_parts.encode([prompt], 64),
                blank,
                steps=12,
                guidance_scale=4.0,
            )
            pictures += decode(bundled_parts.vae, latents)
    scores = BaseClassifier(bundled_parts).score_prompts(pictures, prompts, "dog")
    assert (scores > 0.5).all(), scores


def test_a_picture_is_held_against_a_fixed_number_of_other_prompts(tiny_parts: BaseParts) -> None:
    prompts = [f"a {letter}" for letter in "uvwxyz"]
    classifier = BaseClassifier(tiny_parts, draws=2, candidates=3)
    scores = classifier.score_prompts([picture(1)] * 6, prompts, "letter")
    own = classifier.probabilities(picture(1), ["a y", "a z", "a u"])[0]
    assert scores[4] == own


@pytest.mark.parametrize(
    "scenes", [SCENES[:1], SCENES, [*SCENES, "a {subject} in a boat"], OTHER_SCENES[:2]]
)
def test_a_picture_is_held_against_four_others_however_many_are_asked(
    tiny_parts: BaseParts, monkeypatch: pytest.MonkeyPatch, scenes: Sequence[str]
) -> None:
    prompts = [scene.format(subject="dog") for scene in scenes]
    classifier = BaseClassifier(tiny_parts, draws=2)
    probabilities, held = classifier.probabilities, list[Sequence[str]]()

    def listening(image: Image.Image, candidates: Sequence[str]) -> torch.Tensor:
        held.append(candidates)
        return probabilities(image, candidates)

    monkeypatch.setattr(classifier, "probabilities", listening)
    scores = classifier.score_prompts([picture(1)] * len(prompts), prompts, "dog")
    assert (scores < 1).all()
    assert [candidates[0] for candidates in held] == prompts
    assert all(len(candidates) == len(set(candidates)) == 5 for candidates in held)
    assert all(set(prompts) <= set(candidates) for candidates in held)
    assert all(prompt.startswith("a dog") for candidates in held for prompt in candidates)


def test_the_other_scenes_are_enough_and_none_is_asked_by_default() -> None:
    assert len(set(OTHER_SCENES)) >= 5
    assert not set(OTHER_SCENES) & set(SCENES)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_bases_of_every_family_can_judge(family: str, tmp_path: Path) -> None:
    parts = BaseParts(save_base(tmp_path, family), torch.device("cpu"))
    features = BaseFeatures(parts).encode_images([picture(1), picture(2)])
    assert features.isfinite().all()
    assert float(cosines(features[:1], features[1:])) < 0.999
    likely = BaseClassifier(parts, draws=2).probabilities(picture(1), ["a dog", "a cat"])
    assert float(likely.sum()) == pytest.approx(1)


@torch.no_grad()
def test_a_base_that_flows_judges_by_the_error_of_its_velocity(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    base = save_base(tmp_path)
    (base / "scheduler" / "scheduler_config.json").unlink()
    FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    parts = BaseParts(base, torch.device("cpu"))
    assert BaseFeatures(parts).encode_images([picture(1)]).isfinite().all()

    x0 = picture_latents(parts, [picture(1)])
    e = torch.randn(x0.shape[1:], generator=generator("classifier", 0))[None]
    sigma = 0.501  # the middle of a thousand that rise from 0.001 to 1
    x_t = (1 - sigma) * x0 + sigma * e
    said = parts.unet(x_t, 1000 * sigma, parts.encode(["a dog"], 64).features).sample
    expected = float(((said - (e - x0)) ** 2).sum())
    found = BaseClassifier(parts, draws=1).errors(picture(1), ["a dog"])
    assert float(found) == pytest.approx(expected, rel=1e-4)
