"""A base that was trained as a flow: found out, trained and sampled as one."""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import TrainingData
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.lora import build
from lookalike_trainers.methods.method import Card
from lookalike_trainers.painting import paint
from lookalike_trainers.prepare import prepare
from support_images import photo
from support_models import RESOLUTION, save_base
from support_ranks import run_request

SHIFT = 3.0


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    save_base(folder / "base", request.param)
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "base/scheduler")
    (folder / "photos").mkdir()
    (folder / "photos/0.jpg").write_bytes(photo(0))
    return folder


def prepared(folder: Path) -> tuple[BaseParts, TrainingData, LoraConfig]:
    config = LoraConfig(resolution=RESOLUTION, batch_size=3)
    parts = BaseParts(folder / "base", torch.device("cpu"))
    data, _ = prepare(run_request(folder, config), config, parts, lambda message: None)
    return parts, data, config


def test_its_scheduler_says_that_it_is_a_flow(folder: Path, settings: Settings) -> None:
    base = bases.resolve(str(folder / "base"), settings)
    assert base.prediction_type == "flow_prediction"


def test_its_noisy_latents_lie_on_the_line_that_its_target_points_along(folder: Path) -> None:
    """x_t - sigma (e - x_0) = x_0, which here has no noise of the encoder's beyond its own draw."""
    _, data, _ = prepared(folder)
    batch = data.batch(0, 0, 0, 1)
    sigmas = batch.timesteps.view(-1, 1, 1, 1) / 1000
    found = batch.noisy - sigmas * batch.target
    (view,) = data.buckets[0].photos[0]
    spread = (found / data.scaling_factor - view.moments.mean) / view.moments.std
    assert spread.abs().max() < 5
    assert 0.9 < float(spread.std()) < 1.1
    known = FlowMatchEulerDiscreteScheduler(shift=SHIFT).timesteps
    assert all((known - t).abs().min() < 1e-3 for t in batch.timesteps)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_its_adapters_say_so_and_it_paints(folder: Path, tmp_path: Path) -> None:
    parts, _, config = prepared(folder)
    family = "sdxl" if len(parts.tokenizers) > 1 else "sd1"
    card = Card("t", family, RESOLUTION, "sks", "flow_prediction")
    path = build(parts, config).save(tmp_path, card)
    assert read_header(path).metadata["modelspec.prediction_type"] == "flow_prediction"
    fresh = BaseParts(folder / "base", torch.device("cpu"))
    ((picture,),) = paint(fresh, ["a dog"], [0], RESOLUTION)
    assert numpy.asarray(picture).std() > 0
