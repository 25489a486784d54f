"""What early stopping measures: which photos, under which luck, with which weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lookalike_datasets.features.latents import Moments
from lookalike_platform.conditioning import Text
from lookalike_platform.files import sha256_file
from lookalike_trainers.average import Average
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import Batch, Bucket, TrainingData, View
from lookalike_trainers.early_stopping import evaluation_loss
from lookalike_trainers.engine import Engine
from lookalike_trainers.method_configs import CustomDiffusionConfig, LoraConfig
from lookalike_trainers.objective import NoiseSchedule
from lookalike_trainers.prepare import prepare
from lookalike_trainers.run_request import MoreSubject, RunImage
from lookalike_trainers.subjects import subjects_of
from support_images import encoded, picture
from support_methods import CPU
from support_models import RESOLUTION, save_base
from support_ranks import run_request

SIZES = (64, 64, 0, 0, 64, 64)
EXACT = NoiseSchedule.diffusion(torch.ones(1000), "epsilon")
"""Nothing is noised: latents come out as they are."""


def photo(number: int, caption: int = 1, height: int = 8, width: int = 8) -> list[View]:
    """One view, all of whose latents are the photo's number."""
    mean = torch.full((4, height, width), float(number))
    return [View(Moments(mean, torch.zeros_like(mean)), caption, SIZES)]


def data(*buckets: list[list[View]], **config: Any) -> TrainingData:
    torch.manual_seed(0)
    return TrainingData(
        buckets=[Bucket(photos, []) for photos in buckets],
        texts=Text(torch.randn(2, 6, 8)),
        schedule=EXACT,
        scaling_factor=1.0,
        config=LoraConfig(**config),
    )


def seen(batches: list[Batch]) -> list[int]:
    return [int(latents.flatten()[0]) for batch in batches for latents in batch.noisy]


def test_it_is_of_photos_under_luck_of_its_own_that_never_changes() -> None:
    photos = [photo(number) for number in range(3)]
    linear = NoiseSchedule.diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon")
    whole = replace(data(photos, caption_dropout=1.0, batch_size=2), schedule=linear)
    (batch,) = whole.evaluation()
    (again,) = replace(whole, config=LoraConfig(caption_dropout=1.0, batch_size=4)).evaluation()
    assert torch.equal(batch.noisy, again.noisy)
    assert torch.equal(batch.timesteps, again.timesteps)
    assert len(batch.noisy) == 8
    assert batch.weight.tolist() == [1 / 8] * 8  # one plain mean, whatever min-SNR says
    assert isinstance(batch.text, Text)
    assert isinstance(whole.texts, Text)
    assert torch.equal(batch.text.features, whole.texts[[1] * 8].features)  # none is dropped
    assert not torch.equal(batch.timesteps[:2], whole.batch(0, 0, 0, 1).timesteps[:2])


def test_several_shapes_are_one_mean_over_all_of_them() -> None:
    wide, tall = [photo(n, height=6, width=10) for n in (0, 1)], [photo(2, height=10, width=6)]
    batches = data(wide, tall).evaluation()
    assert sum(float(batch.weight.sum()) for batch in batches) == pytest.approx(1)
    assert [len(batch.noisy) for batch in batches] == [6, 2]


def test_fewer_photos_than_samples_come_in_turn_and_of_more_they_are_spread() -> None:
    few = data([photo(number) for number in range(3)]).evaluation()
    assert seen(few) == [0, 1, 2, 0, 1, 2, 0, 1]
    many = [photo(number) for number in range(20)]
    assert seen(data(many).evaluation()) == [0, 2, 5, 7, 10, 12, 15, 17]
    apart = data(many[:9], [photo(n, height=6, width=10) for n in range(9, 20)])
    assert seen(apart.evaluation()) == [0, 2, 5, 7, 10, 12, 15, 17]


@pytest.mark.parametrize(
    ("photos", "expected"),
    [
        ([9, 9], {0: 4, 1: 4}),
        ([30, 1, 3], {0: 3, 1: 3, 2: 2}),
        ([4] * 12, dict.fromkeys(range(12), 1)),
    ],
    ids=["two", "unequal", "twelve"],
)
@pytest.mark.parametrize("buckets", [1, 2])
def test_every_subject_has_its_share_whatever_shapes_its_photos_have(
    photos: list[int], expected: dict[int, int], buckets: int
) -> None:
    shapes: list[list[list[View]]] = [[] for _ in range(buckets)]
    for subject, count in enumerate(photos):
        for number in range(count):
            wide = 2 * (number % buckets)
            (view,) = photo(subject, width=8 + wide)
            shapes[number % buckets].append([replace(view, subject=subject)])
    batches = data(*filter(None, shapes)).evaluation()
    assert Counter(seen(batches)) == expected
    assert sum(float(batch.weight.sum()) for batch in batches) == pytest.approx(1)


def test_each_subject_of_a_request_is_watched_alike(tmp_path: Path) -> None:
    """From the request on: nine photos of each, of which three are wide."""
    save_base(tmp_path / "base")
    subjects = []
    for first in (0, 9):
        images = []
        for number in range(first, first + 9):
            path = tmp_path / "photos" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            size = (120, 60) if number % 3 == 0 else (80, 80)
            path.write_bytes(encoded(picture(number, size), "PNG"))
            images.append(RunImage(path=path, sha256=sha256_file(path)))
        subjects.append(images)
    config = CustomDiffusionConfig(
        resolution=RESOLUTION, initializer="dog", also=("set_a",), aspect_buckets=True, sizes=2
    )
    also = [MoreSubject(class_noun="cat", images=subjects[1])]
    request = run_request(tmp_path, config, method="custom_diffusion")
    request = request.model_copy(update={"images": subjects[0], "also": also})
    parts = BaseParts(tmp_path / "base", CPU)
    for subject in subjects_of(request, config):
        parts.learn(subject.config.trigger, 1)
    batches = prepare(request, config, parts, lambda message: None)[0].evaluation()
    assert len(batches) == 2
    found = torch.cat([batch.text for batch in batches])  # type: ignore[misc]
    for (name,) in parts.learned.values():
        word = parts.tokenizers[0].convert_tokens_to_ids(name)
        assert int((found == word).any(dim=(1, 2)).sum()) == 4


class Constant(nn.Module):
    """A denoiser that always answers its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, noisy: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.weight.expand_as(noisy)


def test_with_an_average_it_is_the_averages_loss_that_is_measured() -> None:
    """They are what the run leaves; afterwards training goes on from the last step's weights."""
    model = Constant()
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.update()
    mean = float(average.whole("weight"))
    assert 1 < mean < 3
    batches = data([photo(0)]).evaluation()
    engine = Engine(model, None, [], 1.0, 0, 1, 0, CPU, average=average)
    noise = batches[0].target
    expected = float((mean - noise).square().mean())
    assert evaluation_loss(engine, batches) == pytest.approx(expected)
    assert torch.equal(model.weight, torch.tensor(1.0))
    engine.average = None
    expected = float((1 - noise).square().mean())
    assert evaluation_loss(engine, batches) == pytest.approx(expected)
