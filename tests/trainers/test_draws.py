"""A run's luck depends on the seed, the step and the place in it, and on nothing else."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from lookalike_datasets.features.latents import Moments
from lookalike_platform.conditioning import Text
from lookalike_trainers.config import PriorConfig
from lookalike_trainers.data import Batch, Bucket, TrainingData, View
from lookalike_trainers.draws import Draw, bucket_turn, draw
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.objective import NoiseSchedule

PHOTOS, CLASS_IMAGES = 3, 5
SIZES = (64, 64, 0, 0, 64, 64)


def one(step: int = 0, place: int = 0, seed: int = 0, **changes: Any) -> Draw:
    options: dict[str, Any] = {
        "position": step * 4 + place,
        "photos": PHOTOS,
        "timesteps": 1000,
        "caption_dropout": 0.5,
        "noise_offset": 0.0,
        "shape": (4, 8, 8),
        "of": "instance",
    }
    return draw(seed, step, place, **options | changes)


def data(**config: Any) -> TrainingData:
    def images(count: int) -> list[list[View]]:
        return [[view()] for _ in range(count)]

    def view() -> View:
        return View(Moments(torch.randn(4, 8, 8), torch.rand(4, 8, 8)), 1, SIZES)

    torch.manual_seed(0)
    return TrainingData(
        buckets=[Bucket(images(PHOTOS), images(CLASS_IMAGES))],
        texts=Text(torch.randn(2, 6, 8)),
        schedule=NoiseSchedule.diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon"),
        scaling_factor=0.5,
        config=LoraConfig(prior=PriorConfig(), **config),
    )


def features(text: Text | torch.Tensor) -> torch.Tensor:
    assert isinstance(text, Text)
    return text.features


def halves(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Instance and class samples."""
    instance, prior = batch.noisy.chunk(2)
    return instance, prior


def test_the_same_coordinates_give_the_same_draw_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = one(3, 2)
    torch.randn(10)
    assert vars(one(3, 2)).keys() == vars(first).keys()
    assert torch.equal(one(3, 2).noise, first.noise)
    assert torch.equal(one(3, 2).posterior, first.posterior)
    assert one(3, 2).timestep == first.timestep


@pytest.mark.parametrize(
    "other", [{"step": 1}, {"place": 1}, {"seed": 1}, {"of": "class"}], ids=lambda c: next(iter(c))
)
def test_any_other_coordinate_gives_another_draw(other: dict[str, Any]) -> None:
    assert not torch.equal(one(**other).noise, one().noise)


def test_noise_and_the_encoders_noise_are_independent_unit_gaussians() -> None:
    draws = [one(batch, shape=(4, 16, 16)) for batch in range(50)]
    noise = torch.stack([d.noise for d in draws]).flatten()
    posterior = torch.stack([d.posterior for d in draws]).flatten()
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert (noise * posterior).mean().abs() < 0.02


def test_timesteps_views_and_dropped_captions_come_at_their_rates() -> None:
    draws = [one(batch, place, shape=(1, 1, 1)) for batch in range(500) for place in range(4)]
    timesteps = torch.tensor([float(d.timestep) for d in draws])
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert abs(timesteps.mean() - 499.5) < 25
    assert abs(sum(d.drop_caption for d in draws) / len(draws) - 0.5) < 0.05
    assert abs(sum(d.look >= 0.5 for d in draws) / len(draws) - 0.5) < 0.05


def test_captions_are_never_dropped_at_rate_0_and_always_at_rate_1() -> None:
    assert not any(one(b, caption_dropout=0.0).drop_caption for b in range(100))
    assert all(one(b, caption_dropout=1.0).drop_caption for b in range(100))


def test_every_photo_comes_once_before_any_comes_twice() -> None:
    """Four places a batch over three photos: a round of photos goes on into the next batch."""
    order = [one(batch, place).photo for batch in range(3) for place in range(4)]
    for start in range(0, 12, PHOTOS):
        assert sorted(order[start : start + PHOTOS]) == [0, 1, 2]
    assert Counter(order) == {0: 4, 1: 4, 2: 4}


def test_two_processes_share_what_one_would_draw_alone() -> None:
    alone = data(batch_size=4).batch(5, 0, rank=0, world=1)
    first = data(batch_size=2).batch(5, 0, rank=0, world=2)
    second = data(batch_size=2).batch(5, 0, rank=1, world=2)
    for part in (0, 1):
        together = torch.cat([halves(first)[part], halves(second)[part]])
        assert torch.equal(together, halves(alone)[part])


def test_two_micro_batches_share_what_one_batch_would_draw() -> None:
    whole = data(batch_size=4).batch(5, 0, rank=0, world=1)
    small = data(batch_size=2, gradient_accumulation_steps=2)
    for part in (0, 1):
        micro = [halves(small.batch(5, m, rank=0, world=1))[part] for m in (0, 1)]
        assert torch.equal(torch.cat(micro), halves(whole)[part])


def test_a_dropped_caption_is_the_empty_prompt() -> None:
    always = data(caption_dropout=1.0)
    assert torch.equal(features(always.batch(0, 0, 0, 1).text), features(always.texts[[0] * 8]))
    never = data(caption_dropout=0.0)
    assert torch.equal(features(never.batch(0, 0, 0, 1).text), features(never.texts[[1] * 8]))


def test_without_noise_in_the_encoder_latents_are_its_scaled_means() -> None:
    random = data()
    exact = [
        [replace(v, moments=replace(v.moments, std=torch.zeros(4, 8, 8))) for v in views]
        for views in random.buckets[0].photos
    ]
    clean = replace(
        random,
        buckets=[Bucket(exact, [])],
        schedule=NoiseSchedule.diffusion(torch.ones(1000), "epsilon"),
        config=LoraConfig(),
    )
    means = [view.moments.mean * clean.scaling_factor for (view,) in exact]
    for latent in clean.batch(0, 0, 0, 1).noisy:
        assert any(torch.equal(latent, mean) for mean in means)


def test_a_noise_offset_moves_whole_channels_and_nothing_else_of_the_draw() -> None:
    plain, moved = one(), one(noise_offset=0.3)
    offset = moved.noise - plain.noise
    torch.testing.assert_close(offset, offset.mean((1, 2), keepdim=True).expand_as(offset))
    assert torch.equal(moved.posterior, plain.posterior)
    assert (moved.timestep, moved.photo, moved.look) == (plain.timestep, plain.photo, plain.look)
    shifts = [one(n, noise_offset=0.3).noise - one(n).noise for n in range(200)]
    spread = torch.stack(shifts)[:, :, 0, 0].std()
    assert abs(spread - 0.3) < 0.03


def test_steps_are_of_one_bucket_each_and_photos_of_all_come_equally_often() -> None:
    photos = [3, 1, 2]
    turns = [bucket_turn(7, step, photos) for step in range(24)]
    for start in range(0, 24, 6):
        seen = [bucket for bucket, _ in turns[start : start + 6]]
        assert Counter(seen) == {0: 3, 1: 1, 2: 2}
    for bucket in range(3):
        assert [turn for b, turn in turns if b == bucket] == list(range(4 * photos[bucket]))
    assert [b for b, _ in turns] != sorted(b for b, _ in turns)


def test_a_batch_shows_the_photos_of_its_bucket_in_their_shape() -> None:
    def photo(height: int, width: int) -> list[View]:
        return [
            View(Moments(torch.randn(4, height, width), torch.rand(4, height, width)), 1, SIZES)
        ]

    wide, tall = [photo(6, 10) for _ in range(2)], [photo(10, 6)]
    bucketed = replace(data(), buckets=[Bucket(wide, []), Bucket(tall, [])], config=LoraConfig())
    shapes = [tuple(bucketed.batch(step, 0, 0, 1).noisy.shape[2:]) for step in range(6)]
    assert Counter(shapes) == {(6, 10): 4, (10, 6): 2}
    whole = bucketed.batch(3, 0, rank=0, world=1)
    halves = replace(bucketed, config=LoraConfig(batch_size=2))
    shared = [halves.batch(3, 0, rank, world=2).noisy for rank in (0, 1)]
    assert torch.equal(torch.cat(shared), whole.noisy)


def test_masks_go_with_their_views_and_whole_ones_with_the_rest() -> None:
    mask = torch.rand(1, 8, 8)
    plain = data()
    (first,), *others = plain.buckets[0].photos
    masked = [[replace(first, moments=replace(first.moments, mask=mask))], *others]
    assert plain.batch(0, 0, 0, 1).mask is None
    whole = replace(plain, buckets=[Bucket(masked, plain.buckets[0].class_images)])
    found = whole.batch(0, 0, 0, 1).mask
    assert found is not None
    assert found.shape == (8, 1, 8, 8)
    chosen = [one(0, place).photo for place in range(4)]
    for place, photo in enumerate(chosen):
        assert torch.equal(found[place], mask if photo == 0 else torch.ones(1, 8, 8))
    assert torch.equal(found[4:], torch.ones(4, 1, 8, 8))
