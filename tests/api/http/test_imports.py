"""Adapters of other programs as versions here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lookalike_api.client import Client
from lookalike_platform import bases
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import base_shapes
from support_api import Api

SPELLED = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
ABOUT = {"name": "guest", "class_noun": "dog", "trigger": "zwx"}


def width_of(module: str, api: Api) -> int:
    base = bases.resolve("pocket-64", api.settings)
    return base_shapes(base.folder)[module][0]


def kohya(folder: Path, api: Api, **more: torch.Tensor) -> Path:
    """A LoRA of one layer of the bundled base, as kohya writes it."""
    generator = torch.Generator().manual_seed(0)
    width = width_of("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", api)
    tensors = {
        f"{SPELLED}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{SPELLED}.lora_up.weight": torch.randn(width, 2, generator=generator),
        f"{SPELLED}.alpha": torch.tensor(1.0),
    }
    path = folder / "guest.safetensors"
    save_file(tensors | more, path)
    return path


def test_a_lora_of_kohyas_becomes_a_version_and_is_exported_as_it_came(
    api: Api, tmp_path: Path
) -> None:
    file = kohya(tmp_path, api)
    with Client(api.url) as look:
        version = look.import_adapter([file], **ABOUT)
        assert (version["name"], version["method"], version["trigger"]) == ("guest", "lora", "zwx")
        assert version["aliases"] == ["candidate"]
        again = look.import_adapter([file], **ABOUT)
        assert again["id"] == version["id"]
        (back,), _ = look.export("guest", "kohya", tmp_path / "back")
    found, sent = load_file(back), load_file(file)
    assert found.keys() == sent.keys()
    for tensors in (found, sent):  # alpha may be in B
        scale = tensors[f"{SPELLED}.alpha"] / 2
        tensors["product"] = scale * (
            tensors[f"{SPELLED}.lora_up.weight"] @ tensors[f"{SPELLED}.lora_down.weight"]
        )
    torch.testing.assert_close(found["product"], sent["product"])


def test_an_unknown_key_refuses_the_file_by_name(api: Api, tmp_path: Path) -> None:
    file = kohya(tmp_path, api, clip_skip=torch.zeros(1))
    with Client(api.url) as look, pytest.raises(InvalidRequest) as refused:
        look.import_adapter([file], **ABOUT)
    assert [field.path for field in refused.value.fields] == ["clip_skip"]
