"""Files of other programs that are not understood, and what is said of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.formats.load import load
from support_formats import exported, saved


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("lora_unet_nowhere.lora_down.weight", "is no layer of the base model"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", "is not a key"),
        ("clip_skip", "is not a key"),
    ],
)
def test_keys_that_are_not_understood_refuse_the_file_by_name(
    base: Path, tmp_path: Path, key: str, why: str
) -> None:
    file = saved(base, tmp_path / "own", "lora", rank=2)
    (made,) = exported(file, base, "kohya", tmp_path / "out").files
    save_file(load_file(made) | {key: torch.zeros(2, 2)}, made)
    with pytest.raises(InvalidRequest) as refused:
        load([made], base)
    assert [field.path for field in refused.value.fields] == [key]
    assert why in refused.value.fields[0].message


def test_custom_diffusion_of_self_attention_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    """Its own layers are those that hear the text."""
    file = saved(base, tmp_path / "own", "custom_diffusion")
    weights, _ = exported(file, base, "diffusers", tmp_path / "out").files
    tensors = load_file(weights)
    key = next(key for key in tensors if "to_k" in key).replace("attn2", "attn1")
    unet = load_file(next((base / "unet").glob("*.safetensors")))
    own = unet[key.replace("processor.to_k_custom_diffusion", "to_k")]
    kept = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    save_file({**kept, key: own + 1}, weights)
    with pytest.raises(InvalidRequest) as refused:
        load([weights], base)
    assert [field.path for field in refused.value.fields] == [key]
    assert "attn2 alone" in refused.value.fields[0].message


def test_files_of_no_known_format_of_another_base_and_pickles_are_refused(
    base: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange.safetensors"
    save_file({"model.weight": torch.zeros(2)}, strange)
    with pytest.raises(InvalidRequest) as refused:
        load([strange], base)
    assert [field.path for field in refused.value.fields] == ["model.weight"]

    wide = tmp_path / "wide.safetensors"
    save_file({"emb_params": torch.zeros(1, 7)}, wide)
    with pytest.raises(InvalidRequest) as refused:
        load([wide], base)
    assert "emb_params" in [field.path for field in refused.value.fields]

    pickled = tmp_path / "word.pt"
    torch.save({"emb_params": torch.zeros(1, 16)}, pickled)
    with pytest.raises(InvalidRequest, match="pickle"):
        load([pickled], base)


def test_a_number_in_place_of_a_word_s_rows_is_refused_by_its_name(
    base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "number.safetensors"
    save_file({"emb_params": torch.tensor(1.0)}, file)
    with pytest.raises(InvalidRequest, match=r"emb_params: is \[\]"):
        load([file], base)
