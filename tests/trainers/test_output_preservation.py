"""Differential output preservation: the class keeps the base's answers, without class images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lookalike_datasets.features.latents import Moments
from lookalike_platform.conditioning import Text, predict
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import Bucket, Reference, TrainingData
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.lora import Lora, build
from lookalike_trainers.prepare import prepare
from support_images import photo
from support_models import RESOLUTION, save_base
from support_ranks import run_request

CPU = torch.device("cpu")
WEIGHT = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preserved")
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(2):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    return folder


def prepared(folder: Path, **options: Any) -> tuple[Lora, TrainingData]:
    config = LoraConfig(
        resolution=RESOLUTION,
        rank=2,
        batch_size=2,
        caption_dropout=0.0,
        output_preservation={"weight": WEIGHT},
        **options,
    )
    parts = BaseParts(folder / "base", CPU)
    data, _ = prepare(run_request(folder, config), config, parts, lambda message: None)
    torch.manual_seed(0)
    return build(parts, config), data


def in_float64(data: TrainingData) -> TrainingData:
    assert data.reference is not None
    assert isinstance(data.texts, Text)
    data.reference.base.double()
    texts = data.reference.texts.to("cpu", torch.float64)
    views = [
        [
            replace(view, moments=Moments(view.moments.mean.double(), view.moments.std.double()))
            for view in photo
        ]
        for photo in data.buckets[0].photos
    ]
    return replace(
        data,
        buckets=[Bucket(views, [])],
        texts=data.texts.to("cpu", torch.float64),
        reference=Reference(data.reference.base, texts),
    )


def test_loss_and_gradient_are_the_subjects_and_the_distance_from_the_base_on_the_class(
    folder: Path,
) -> None:
    """MSE(e', e | a sks dog) + lambda MSE(e', base | a dog), written out term by term, float64."""
    method, data = prepared(folder, min_snr_gamma=None)
    method.module.double()
    trained = [p for p in method.module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.3)
    batch = in_float64(data).batch(0, 0, 0, 1)
    loss = method.loss(batch.answered_by(method.module), batch)
    gradients = torch.autograd.grad(loss, trained)

    base = BaseParts(folder / "base", CPU)
    plain = base.encode(["a dog"] * 2, RESOLUTION).to("cpu", torch.float64)
    subject = base.encode(["a sks dog"] * 2, RESOLUTION).to("cpu", torch.float64)
    unet, own = method.module.unet, base.unet.double()
    noisy, t = batch.noisy[:2], batch.timesteps[:2]
    learned = predict(unet, noisy, t, subject) - batch.target[:2]
    kept = predict(unet, noisy, t, plain) - predict(own, noisy, t, plain)
    expected = learned.square().mean() + WEIGHT * kept.square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for mine, naive in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-7, atol=1e-7 * float(naive.abs().max()))
    assert torch.equal(batch.noisy[2:], noisy)
    assert torch.equal(batch.timesteps[2:], t)


def test_an_adapter_at_its_start_is_not_pulled_anywhere(folder: Path) -> None:
    """In float64: in float32, sums over another number of rows are rounded otherwise."""
    method, data = prepared(folder)
    method.module.double()
    batch = in_float64(data).batch(3, 0, 0, 1)
    prediction = batch.answered_by(method.module)
    torch.testing.assert_close(prediction[2:], batch.target[2:], rtol=0, atol=1e-12)
    assert (prediction[:2] - batch.target[:2]).abs().max() > 0.1


def test_an_adapter_at_its_start_is_not_pulled_anywhere_in_half_precision(folder: Path) -> None:
    method, data = prepared(folder, mixed_precision="bf16")
    batch = data.batch(3, 0, 0, 1)
    prediction = batch.answered_by(method.module)
    torch.testing.assert_close(prediction[2:].float(), batch.target[2:], rtol=0, atol=1e-6)
    assert (prediction[:2] - batch.target[:2]).abs().max() > 0.1


def test_the_base_answers_for_the_class_where_the_text_encoder_trains_too(folder: Path) -> None:
    method, data = prepared(folder, train_text_encoder=True, token_vectors=0)
    batch = data.batch(1, 0, 0, 1)
    assert isinstance(batch.text, torch.Tensor)
    assert torch.equal(batch.text[2:], BaseParts(folder / "base", CPU).ids(["a dog"] * 2))
    prediction = batch.answered_by(method.module)
    torch.testing.assert_close(prediction[2:].float(), batch.target[2:], rtol=0, atol=1e-6)


def test_the_base_itself_is_another_and_does_not_change(folder: Path) -> None:
    method, data = prepared(folder)
    assert data.reference is not None
    mine = {p.data_ptr() for p in method.module.parameters()}
    assert not mine & {p.data_ptr() for p in data.reference.base.parameters()}
    assert not any(p.requires_grad for p in data.reference.base.parameters())


def test_class_images_and_preserved_output_are_not_asked_for_together() -> None:
    with pytest.raises(ValidationError, match="output_preservation: leave it out"):
        LoraConfig(prior={}, output_preservation={})
