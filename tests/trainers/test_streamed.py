"""A UNet read in bfloat16 tensor by tensor is the one that is read whole and rounded."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.streamed import WEIGHTS, load_streamed
from support_models import save_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path)
    return tmp_path / "unet"


@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_every_weight_is_rounded_once(folder: Path, shards: str) -> None:
    whole = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    if shards == "shards":
        (folder / WEIGHTS).unlink()
        whole.save_pretrained(folder, max_shard_size="100KB")
        assert not (folder / WEIGHTS).exists()
    streamed = load_streamed(UNet2DConditionModel, folder, torch.bfloat16).state_dict()
    assert list(streamed) == list(whole.state_dict())
    for name, weight in whole.state_dict().items():
        assert torch.equal(streamed[name], weight.bfloat16()), name


def test_a_file_that_lacks_a_weight_is_refused_with_its_name(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_out.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(RuntimeError, match=r"conv_out\.bias"):
        load_streamed(UNet2DConditionModel, folder, torch.bfloat16)


def test_a_run_in_bf16_takes_its_frozen_unet_rounded(folder: Path) -> None:
    parts = BaseParts(folder.parent, torch.device("cpu"))
    assert {p.dtype for p in parts.take_frozen_unet(bf16=True).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in parts.take_frozen_unet(bf16=False).parameters()} == {torch.float32}
