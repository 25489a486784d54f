"""Which layers LoRA adapts, and with what rank."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import check_against_base
from lookalike_trainers.methods.lora import Lora
from support_methods import CARD, made
from support_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def lora(base: Path, **config: Any) -> Lora:
    method: Lora = made(base, "lora", **config)[0]
    return method


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (("attention",), {"to_q", "to_k", "to_v", "to_out.0"}),
        (("feed_forward",), {"ff.net.0.proj", "ff.net.2"}),
        (
            ("convolution",),
            {"conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"},
        ),
        (("attn2.to_k", "feed_forward"), {"attn2.to_k", "ff.net.0.proj", "ff.net.2"}),
    ],
)
def test_targets_are_groups_or_names(base: Path, targets: tuple[str, ...], ends: set[str]) -> None:
    unet = lora(base, targets=targets).module.unet
    adapted = {n.partition(".lora_")[0] for n, p in unet.named_parameters() if p.requires_grad}
    layers = {n for n, m in unet.named_modules() if hasattr(m, "base_layer")}
    assert adapted == layers
    assert {end for end in ends for name in adapted if name.endswith(f".{end}")} == ends
    assert all(any(name.endswith(f".{end}") for end in ends) for name in adapted)


def test_modules_may_have_ranks_of_their_own(base: Path) -> None:
    method = lora(base, rank=3, ranks={"attn2.to_k": 7, "to_out.0": 1})
    for name, parameter in method.module.unet.named_parameters():
        if "lora_A" in name:
            own = 7 if "attn2.to_k" in name else 1 if "to_out.0" in name else 3
            assert len(parameter) == own


@pytest.mark.parametrize(
    "ranks",
    [
        {"attention": 4, "attn2.to_k": 2, "to_q": 1},
        {"attn2.to_k": 2, "to_q": 1, "attention": 4},
        {"to_k": 4, "to_v": 4, "to_out.0": 4, "to_q": 1, "attn2.to_k": 2},
    ],
)
def test_of_ranks_that_fit_a_module_the_longest_name_counts_in_whatever_order(
    base: Path, tmp_path: Path, ranks: dict[str, int]
) -> None:
    """And for whoever reads the file."""
    method = lora(base, rank=3, ranks=ranks)
    file = method.save(tmp_path, CARD)
    check_against_base(file, base)
    for name, tensor in load_file(file).items():
        if "lora_A" in name:
            assert len(tensor) == (2 if "attn2.to_k" in name else 1 if "to_q" in name else 4)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"targets": ("to_nothing",)}, "config.targets"),
        ({"targets": ("attention", "to_nothing")}, "config.targets"),
        ({"ranks": {"to_nothing": 2}}, "config.ranks"),
        ({"ranks": {"feed_forward": 2}}, "config.ranks"),
        ({"targets": ("q_proj",), "train_text_encoder": True}, "config.targets"),
    ],
)
def test_targets_and_ranks_without_a_layer_are_refused_by_their_field(
    base: Path, config: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        lora(base, **config)
    assert [problem.path for problem in refused.value.fields] == [field]
