"""ED-LoRA against the paper written out: every cross-attention layer by its own prompt's text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.func import functional_call
from transformers import CLIPTextModel

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import save_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.ed_lora import cross_attention, wear
from support_methods import (
    CARD,
    CPU,
    batch,
    check_every_declared_parameter_moves_and_no_other,
    check_its_file_is_the_method,
    loss_of,
    made,
    one_row,
    trained,
)
from support_models import RESOLUTION, save_base

LAYERS = 4  # one a transformer: down, middle, and two up


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_base(tmp_path_factory.mktemp(family), family) for family in ("sd1", "sdxl")
    }


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["sd1"]


def changed(model: Any, plain: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each W + B A (alpha is the rank), and its leaves."""
    leaves = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    weights = {}
    for module in {name.partition(".lora_")[0] for name in leaves}:
        down = leaves[f"{module}.lora_A.default.weight"]
        up = leaves[f"{module}.lora_B.default.weight"]
        weights[f"{module}.weight"] = plain.get_parameter(f"{module}.weight") + up @ down
    return weights, leaves


class Reads(torch.nn.Module):
    """A cross-attention layer told what to read, whatever the UNet passes on."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.text: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        answer: torch.Tensor = self.attention(x, encoder_hidden_states=self.text)
        return answer


def test_loss_and_gradients_are_those_of_the_paper(base: Path) -> None:
    method, parts = trained(base, "ed_lora", rank=3, learning_rate=1e-2)
    method.module.double()
    one = batch(method, parts, torch.float64)
    for parameter in method.module.parameters():
        parameter.grad = None
    loss = loss_of(method, one)
    loss.backward()

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").double()
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").double()
    in_unet, unet_leaves = changed(method.module.unet, unet)
    in_text, text_leaves = changed(method.module.text_encoders[0], encoder)
    rows = method.rows[0].rows.detach().clone().requires_grad_()
    words = rows.view(2, LAYERS, -1)  # V_rand and V_class, a row for each layer
    ids = one.text[:, 0]
    table = encoder.get_input_embeddings().weight
    features = []
    for layer in range(LAYERS):
        whole = torch.cat([table, words[:, layer]])
        assert int(ids.max()) == len(whole) - 1
        weights = in_text | {"embeddings.token_embedding.weight": whole}
        features.append(functional_call(encoder, weights, (ids,))[0])
    # By name, each layer its own: down, mid, up.
    names = sorted(name for name, _ in unet.named_modules() if name.endswith("attn2"))
    for name, text in zip(names, features, strict=True):
        told = Reads(unet.get_submodule(name))
        told.text = text
        unet.set_submodule(name, told)
    in_unet = {
        name.replace("attn2.", "attn2.attention."): weight for name, weight in in_unet.items()
    }
    predicted = functional_call(unet, in_unet, (one.noisy, one.timesteps, features[0])).sample
    expected = (one.weight * (predicted - one.target).square().flatten(1).mean(1)).sum()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found = [(method.rows[0].rows.grad, rows.grad)]
    for model, leaves in (
        (method.module.unet, unet_leaves),
        (method.module.text_encoders[0], text_leaves),
    ):
        found += [(p.grad, leaves[n].grad) for n, p in model.named_parameters() if n in leaves]
    for slope, wanted in found:
        assert wanted is not None
        scale = float(wanted.abs().max())
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12 * scale)


def test_the_word_begins_as_noise_and_the_class_noun_in_every_layer(base: Path) -> None:
    method, parts = made(base, "ed_lora")
    first, second = method.rows[0].rows.detach().view(2, LAYERS, -1)
    own = BaseParts(base, CPU)
    letters = own.tokenizers[0]("dog", add_special_tokens=False).input_ids
    table = own.text_encoders[0].get_input_embeddings().weight
    torch.testing.assert_close(second, one_row(table[letters]).expand(LAYERS, -1))
    assert torch.equal(first, first[:1].expand(LAYERS, -1))
    assert 0.005 < float(first.std()) < 0.03
    assert not torch.equal(first, second)
    assert parts.learned == {"sks": ["<sks>", "<sks>_1"]}


def test_only_adapters_and_rows_move_and_all_of_them_do(base: Path) -> None:
    check_every_declared_parameter_moves_and_no_other(base, "ed_lora")
    check_every_declared_parameter_moves_and_no_other(base, "ed_lora", gradient_checkpointing=True)


def test_checkpointed_layers_read_their_own_text_again(base: Path) -> None:
    one, other = (
        trained(base, "ed_lora", gradient_checkpointing=on)[0].module.parameters()
        for on in (True, False)
    )
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_its_file_is_the_method(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    # SDXL's summaries are means over the layers.
    check_its_file_is_the_method(bases[family], tmp_path, "ed_lora", rounds=family == "sdxl")


@pytest.mark.parametrize("first_off", [0, 1])
def test_two_worn_together_read_by_layer_once_and_come_off_in_any_order(
    base: Path, tmp_path: Path, first_off: int
) -> None:
    files = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        method, _ = trained(base, "ed_lora", steps=seed + 1)
        files.append(method.save(tmp_path / str(seed), CARD))

    def features(parts: BaseParts) -> torch.Tensor:
        with torch.no_grad():
            return parts.encode(["a one dog", "a two dog", "a dog"], RESOLUTION).features

    wearer = BaseParts(base, CPU)
    plain = features(wearer)
    offs = [wear(wearer, file, 0.0, word) for file, word in zip(files, ("one", "two"), strict=True)]
    both = features(wearer)
    assert both.shape == (3, LAYERS, *plain.shape[1:])
    for place, (file, word) in enumerate(zip(files, ("one", "two"), strict=True)):
        alone = BaseParts(base, CPU)
        wear(alone, file, 0.0, word)
        torch.testing.assert_close(both[place], features(alone)[place])
    assert torch.equal(both[2], plain[2].expand(LAYERS, -1, -1))
    offs[first_off]()
    assert features(wearer).shape == both.shape
    offs[1 - first_off]()
    assert torch.equal(features(wearer), plain)


def test_words_for_another_number_of_layers_are_refused(base: Path, tmp_path: Path) -> None:
    method, _ = made(base, "ed_lora")
    file = method.save(tmp_path, CARD)
    assert len(cross_attention(method.module.unet)) == LAYERS
    other = tmp_path / "other.safetensors"
    save_tensors(other, "ed_lora", {}, {"layers": LAYERS + 1}, {})
    assert read_header(file).metadata["lookalike.config"] == f'{{"layers": {LAYERS}}}'
    with pytest.raises(InvalidRequest, match="5 cross-attention layers, the base 4"):
        wear(BaseParts(base, CPU), other, 1.0, "sks")
