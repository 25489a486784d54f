"""What holds for every method in catalog.METHODS, on a base of every family."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lookalike_platform.conditioning import predict
from lookalike_platform.files import sha256_file
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import TrainingData
from lookalike_trainers.methods.find import builder_of, wear_of
from lookalike_trainers.methods.method import Card, Method
from lookalike_trainers.prepare import prepare
from lookalike_trainers.run_request import RunImage, RunRequest
from support_images import photo
from support_methods import whole
from support_models import RESOLUTION, save_base

CPU = torch.device("cpu")
FAMILIES = ("sd1", "sd2", "sdxl")
NAMES = [info.name for info in METHODS]
STEPS = 4


@dataclass(frozen=True)
class Trained:
    """A method after a few steps, its file, and every parameter's value before them."""

    name: str
    base: Path
    method: Method
    before: dict[str, torch.Tensor]
    file: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def trained(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Trained]:
    """Trains a method on a family's base, once for all tests."""
    photos = tmp_path_factory.mktemp("photos")
    for number in range(3):
        (photos / f"{number}.png").write_bytes(photo(number))
    done: dict[tuple[str, str], Trained] = {}

    def train(name: str, family: str) -> Trained:
        if (name, family) not in done:
            folder = tmp_path_factory.mktemp(f"{name}-{family}")
            done[name, family] = _train(name, bases[family], sorted(photos.iterdir()), folder)
        return done[name, family]

    return train


def _train(name: str, base: Path, photos: list[Path], folder: Path) -> Trained:
    info = next(info for info in METHODS if info.name == name)
    config = info.config.model_validate(
        {"resolution": RESOLUTION, "initializer": "dog", "batch_size": 2, "caption_dropout": 0.0}
    )
    parts = BaseParts(base, CPU)
    if config.token_vectors:
        parts.learn(config.trigger, config.token_vectors)
    request = RunRequest(
        job_id="job_1",
        owner="local",
        concept="rex",
        class_noun="dog",
        method=name,
        config=config.model_dump(mode="json"),
        base_name="tiny",
        base_folder=base,
        base_fingerprint="tiny",
        base_family="sd1",
        prediction_type="epsilon",
        images=[RunImage(path=path, sha256=sha256_file(path)) for path in photos],
        cache=folder / "cache",
        device="cpu",
    )
    data, _ = prepare(request, config, parts, lambda message: None)
    torch.manual_seed(0)
    method = builder_of(name)(parts, config)
    before = {key: p.detach().clone() for key, p in method.module.named_parameters()}
    _take_steps(method, data, config)
    card = Card("rex", "sd1", RESOLUTION, config.trigger, "epsilon")
    return Trained(name, base, method, before, method.save(folder, card))


def _take_steps(method: Method, data: TrainingData, config: TrainingConfig) -> None:
    """Without the engine; big steps, so that what was learned shows."""
    groups = [{**group, "lr": 0.02} for group in method.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(STEPS):
        batch = data.batch(step, 0, 0, 1)
        prediction = batch.answered_by(method.module)
        method.loss(prediction, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.module.eval()


def _answers(unet: nn.Module, text: Any) -> torch.Tensor:
    noisy = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.cat([predict(unet, noisy, torch.tensor([t]), text) for t in (20, 480, 930)])


def _base_answers(parts: BaseParts, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return _answers(parts.unet, parts.encode([prompt], RESOLUTION))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_declared_parameter_moves_and_no_other_does(
    trained: Callable[[str, str], Trained], name: str, family: str
) -> None:
    run = trained(name, family)
    declared = {id(p) for group in run.method.parameter_groups() for p in group["params"]}
    assert declared
    moved, kept = [], []
    for key, parameter in run.method.module.named_parameters():
        same = torch.equal(parameter.detach(), run.before[key])
        if id(parameter) in declared:
            (kept if same else moved).append(key)
        else:
            assert same, f"{key} was not to train"
    assert not kept
    assert len(moved) == len(declared)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_its_file_worn_on_a_fresh_base_answers_as_the_trained_module_and_comes_off_to_the_bit(
    trained: Callable[[str, str], Trained], name: str, family: str
) -> None:
    run = trained(name, family)
    word, parts = "private_7", BaseParts(run.base, CPU)
    config = next(info for info in METHODS if info.name == name).config
    learns = config.model_fields["token_vectors"].default > 0
    before = _base_answers(parts, "a dog")
    take_off = wear_of(name)(parts, run.file, 1.0, word)
    worn = _base_answers(parts, f"a {word} dog" if learns else "a sks dog")
    torch.testing.assert_close(worn, _trained_answers(run, "a sks dog"), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(worn, before, atol=1e-3)
    take_off()
    assert torch.equal(_base_answers(parts, "a dog"), before)


@pytest.mark.parametrize("name", NAMES)
def test_at_scale_zero_it_is_the_base(trained: Callable[[str, str], Trained], name: str) -> None:
    run = trained(name, "sd1")
    parts = BaseParts(run.base, CPU)
    before = _base_answers(parts, "a dog")
    take_off = wear_of(name)(parts, run.file, 0.0, "private_8")
    torch.testing.assert_close(_base_answers(parts, "a dog"), before)
    take_off()


@pytest.mark.parametrize("name", NAMES)
def test_its_file_holds_only_finite_floats_and_says_what_it_is(
    trained: Callable[[str, str], Trained], name: str
) -> None:
    file = trained(name, "sd1").file
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    metadata = read_header(file).metadata
    assert metadata.get("lookalike.method", "lora") == name
    assert metadata["modelspec.title"] == "rex"


def _trained_answers(run: Trained, prompt: str) -> torch.Tensor:
    """Of the module as it stands after training, its learned words under their own trigger."""
    parts = BaseParts(run.base, CPU)
    module = run.method.module
    if len(module.text_encoders):
        config = next(info for info in METHODS if info.name == run.name).config
        count = config.model_fields["token_vectors"].default
        if count:
            parts.learn("sks", count)
        noisy = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ids, sizes = parts.ids([prompt]), whole(1)
            said = [module(noisy, torch.tensor([t]), ids, sizes) for t in (20, 480, 930)]
            return torch.cat(said)
    with torch.no_grad():
        text = parts.encode([prompt], RESOLUTION)
    return _answers(module.unet, text)
