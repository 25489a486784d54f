"""The preview of what trains, against the methods themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.tensor_file import nth_word, parameter_shapes
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.denoiser import trainable
from lookalike_trainers.method_configs import LoraConfig, SvdiffConfig, TLoraConfig
from lookalike_trainers.methods.find import builder_of
from lookalike_trainers.methods.method import Card
from lookalike_trainers.trainables import count, held_bytes
from support_models import RESOLUTION, save_base

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"targets": ("attention", "convolution"), "ranks": {"attention": 3}, "dora": True},
        {"token_vectors": 2, "train_text_encoder": True},
        {"ranks": {"attention": 4, "attn2.to_k": 2}},
    ],
    "t_lora": [{"targets": ("to_q", "feed_forward")}],
    "svdiff": [{"train_text_encoder": True, "token_vectors": 1}],
    "diff_fit": [{"train_text_encoder": True}],
    "dreambooth": [{"train_text_encoder": True}],
    "textual_inversion": [{"token_vectors": 5}],
    "custom_diffusion": [{"also": ("set_2", "set_3")}],
}
CASES = [
    pytest.param(info.name, options, id=f"{info.name}-{number}")
    for info in METHODS
    for number, options in enumerate([{}, *OPTIONS.get(info.name, [])])
]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_as_many_numbers_train_and_are_kept_as_the_preview_says(
    base: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    info = next(info for info in METHODS if info.name == name)
    config = info.config.model_validate({"resolution": RESOLUTION, "initializer": "dog", **options})
    parts = BaseParts(base, torch.device("cpu"), tmp_path / "cache")
    if config.token_vectors:
        for number in range(1, 2 + len(options.get("also", ()))):
            parts.learn(nth_word(config.trigger, number), config.token_vectors)
    method = builder_of(name)(parts, config)
    said = count(parameter_shapes(base), config)
    assert said.trained == sum(parameter.numel() for parameter in trainable(method.module))
    file = method.save(tmp_path, Card("robot", "sd1", RESOLUTION, "sks", "epsilon"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert said.kept * 4 == file.stat().st_size - header


@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16", "train_text_encoder": True}, {"gradient_checkpointing": True}],
)
def test_svdiff_s_factors_and_products_take_what_the_preview_says(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = SvdiffConfig(resolution=RESOLUTION, **options)
    parts = BaseParts(base, torch.device("cpu"), tmp_path / "cache")
    module = builder_of("svdiff")(parts, config).module
    held = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        for layer in (one for one in module.modules() if parametrize.is_parametrized(one)):
            (spectrum,) = layer.parametrizations["weight"]
            held += sum(factor.nbytes for factor in spectrum.buffers())
            if not config.gradient_checkpointing:
                held += layer.weight.nbytes
    assert held_bytes(parameter_shapes(base), config) == held


def test_a_rank_larger_than_a_layer_is_refused_by_its_field(base: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        count(parameter_shapes(base), TLoraConfig(rank=17))
    assert [field.path for field in refused.value.fields] == ["config.rank"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(targets=("to_nothing",)),
        LoraConfig(targets=("attention", "to_nothing")),
        LoraConfig(targets=("q_proj",), train_text_encoder=True),
        TLoraConfig(targets=("attention", "convolution")),
    ],
)
def test_targets_the_base_does_not_have_are_refused_by_their_field(
    base: Path, config: LoraConfig | TLoraConfig
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        count(parameter_shapes(base), config)
    assert [field.path for field in refused.value.fields] == ["config.targets"]
