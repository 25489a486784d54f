"""DreamBooth against the paper's loss written out, in float64."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from lookalike_platform.conditioning import predict
from lookalike_registry.tensor_file import check_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import Batch
from lookalike_trainers.method_configs import DreamBoothConfig
from lookalike_trainers.methods.dreambooth import DreamBooth, build, wear
from lookalike_trainers.methods.method import Card
from lookalike_trainers.painting import Style, paint
from support_methods import whole
from support_models import RESOLUTION, VAE_SCALE, save_base

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE
CARD = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
PROMPTS = ["a sks dog", "a sks dog", "a dog", "a dog"]
LAMBDA = 0.7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def made(base: Path, **config: Any) -> tuple[DreamBooth, BaseParts]:
    parts = BaseParts(base, CPU)
    return build(parts, DreamBoothConfig(resolution=RESOLUTION, **config)), parts


def batch(base: Path, *, ids: bool, dtype: torch.dtype = torch.float32) -> Batch:
    """Two photos' samples, and two of the class with a weight of 0.7."""
    parts = BaseParts(base, CPU)
    g = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 4, 4, SIDE, SIDE, generator=g, dtype=dtype)
    weight = torch.tensor([0.5, 0.5, LAMBDA / 2, LAMBDA / 2], dtype=dtype)
    timesteps = torch.tensor([10, 700, 300, 999])
    if ids:
        return Batch(noisy, timesteps, parts.ids(PROMPTS), target, weight, whole(len(noisy)))
    with torch.no_grad():
        text = parts.encode(PROMPTS, RESOLUTION).to("cpu", dtype)
    return Batch(noisy, timesteps, text, target, weight, whole(len(noisy)))


def trained(base: Path, *, text: bool = False) -> DreamBooth:
    method, _ = made(
        base, train_text_encoder=text, learning_rate=1e-3, text_encoder_learning_rate=1e-3
    )
    optimizer = torch.optim.AdamW(method.parameter_groups())
    one = batch(base, ids=text)
    for _ in range(3):
        method.loss(one.answered_by(method.module), one).backward()
        optimizer.step()
        optimizer.zero_grad()
    return method


def test_loss_and_gradients_are_those_of_the_paper(base: Path) -> None:
    """MSE on the photos + 0.7 * MSE on the class images, each by itself, through everything."""
    method, _ = made(base, train_text_encoder=True)
    method.module.double()
    one = batch(base, ids=True, dtype=torch.float64)
    loss = method.loss(one.answered_by(method.module), one)
    loss.backward()

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").double()
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").double()
    assert isinstance(one.text, torch.Tensor)

    def mse(rows: slice) -> torch.Tensor:
        features = encoder(one.text[rows, 0]).last_hidden_state
        answer = unet(one.noisy[rows], one.timesteps[rows], features).sample
        return torch.nn.functional.mse_loss(answer, one.target[rows])

    expected = mse(slice(0, 2)) + LAMBDA * mse(slice(2, 4))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    pairs = [
        (method.module.unet.named_parameters(), unet),
        (method.module.text_encoders[0].named_parameters(), encoder),
    ]
    for ours, theirs in pairs:
        own = dict(theirs.named_parameters())
        for name, parameter in ours:
            slope = own[name].grad
            assert slope is not None
            assert parameter.grad is not None
            # Relative to the tensor, not to each number: a key's bias has no slope at all, for
            # softmax does not see it.
            assert (parameter.grad - slope).norm() < 1e-10 * slope.norm() + 1e-15, name


@pytest.mark.parametrize("text", [False, True])
def test_every_weight_of_what_trains_moves_and_the_autoencoder_does_not(
    base: Path, text: bool
) -> None:
    done, fresh = trained(base, text=text), BaseParts(base, CPU)
    before = dict(fresh.unet.named_parameters())
    moved = {n: not torch.equal(p, before[n]) for n, p in done.module.unet.named_parameters()}
    assert all(moved.values()), [name for name, did in moved.items() if not did]
    assert len(done.module.text_encoders) == int(text)
    for encoder in done.module.text_encoders:
        own = dict(fresh.text_encoders[0].named_parameters())
        assert not any(torch.equal(p, own[name]) for name, p in encoder.named_parameters())
    assert [len(group["params"]) > 0 for group in done.parameter_groups()] == [True] * (1 + text)


def test_of_sdxl_only_what_is_read_trains_and_all_of_it_moves(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "sdxl")
    done, fresh = trained(base, text=True), BaseParts(base, CPU)
    for encoder, own in zip(done.module.text_encoders, fresh.text_encoders, strict=True):
        before = dict(own.named_parameters())
        for name, parameter in encoder.named_parameters():
            assert parameter.requires_grad != torch.equal(parameter, before[name]), name
    first = dict(done.module.text_encoders[0].named_parameters())
    still = [name for name, parameter in first.items() if not parameter.requires_grad]
    assert still
    assert all("layers.1." in name or "final_layer_norm" in name for name in still)


@pytest.mark.parametrize(("family", "text"), [("sd1", False), ("sd2", True), ("sdxl", True)])
def test_its_file_on_the_base_paints_what_the_trained_module_does(
    tmp_path: Path, family: str, text: bool
) -> None:
    base = save_base(tmp_path / "base", family)
    method = trained(base, text=text)
    file = method.save(tmp_path, CARD)
    check_tensors(file, base)
    worn, untouched = BaseParts(base, CPU), BaseParts(base, CPU)
    by_module = BaseParts(base, CPU)
    by_module._loaded["unet"] = method.module.unet
    for name, encoder in zip(by_module._names, method.module.text_encoders, strict=False):
        by_module._loaded[name] = encoder

    def says(parts: BaseParts) -> torch.Tensor:
        one = batch(base, ids=False)
        with torch.no_grad():
            text = parts.encode(PROMPTS, RESOLUTION)
            return predict(parts.unet, one.noisy, one.timesteps, text)

    expected, before = says(by_module), says(untouched)
    take_off = wear(worn, file, 1.0, "sks")
    torch.testing.assert_close(says(worn), expected, rtol=1e-5, atol=1e-6)
    mine, trained_paints = (
        numpy.asarray(paint(parts, ["a sks dog"], (3,), RESOLUTION, Style("ddim", 4))[0][0], int)
        for parts in (worn, by_module)
    )
    # base + (trained - base) is trained but for the last bit, which may tip a level's rounding.
    assert abs(mine - trained_paints).max() <= 1
    take_off()
    assert torch.equal(says(worn), before)
    for mine, own in zip(
        [worn.unet, *worn.text_encoders],
        [untouched.unet, *untouched.text_encoders],
        strict=True,
    ):
        own_state = own.state_dict()
        assert all(torch.equal(tensor, own_state[n]) for n, tensor in mine.state_dict().items())
    take_off = wear(worn, file, 0.0, "sks")
    assert torch.equal(says(worn), before)


def test_it_is_worn_on_a_base_that_has_painted_already(base: Path, tmp_path: Path) -> None:
    """Its parts were loaded in inference mode, in which tensors may not be changed later."""
    file = trained(base).save(tmp_path, CARD)
    parts = BaseParts(base, CPU)
    style = Style("ddim", 2)
    before = paint(parts, ["a dog"], (3,), RESOLUTION, style)[0][0].tobytes()
    take_off = wear(parts, file, 1.0, "sks")
    assert paint(parts, ["a dog"], (3,), RESOLUTION, style)[0][0].tobytes() != before
    take_off()
    assert paint(parts, ["a dog"], (3,), RESOLUTION, style)[0][0].tobytes() == before


def test_the_file_holds_a_float32_for_every_weight(base: Path, tmp_path: Path) -> None:
    file = trained(base).save(tmp_path, CARD)
    weights = sum(p.numel() for p in BaseParts(base, CPU).unet.parameters())
    assert 0 <= file.stat().st_size - 4 * weights < 200 * 400
