"""Deltas on a base in memory: what they add, and that nothing of them stays."""

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lookalike_trainers.methods.deltas import differences, named, wear_deltas
from lookalike_trainers.methods.tokens import TokenRows


def wearer(unet: nn.Module) -> Any:
    return SimpleNamespace(unet=unet, text_encoders=[], tokenizers=[], learned={})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


def delta(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.randn((3, 3), generator=torch.Generator().manual_seed(seed))
    return {"delta.unet.0.weight": drawn}


def test_scaled_deltas_add_up() -> None:
    worn, base = model(), model()
    wear_deltas(wearer(worn), delta(1), 0.5)
    wear_deltas(wearer(worn), delta(2), -2.0)
    expected = (
        base[0].weight + 0.5 * delta(1)["delta.unet.0.weight"] - 2 * delta(2)["delta.unet.0.weight"]
    )
    torch.testing.assert_close(worn[0].weight, expected)
    assert torch.equal(worn[1].weight, base[1].weight)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_they_come_off_in_any_order_and_leave_the_base_to_the_bit(order: tuple[int, ...]) -> None:
    worn, base = model(), model()
    offs = [wear_deltas(wearer(worn), delta(seed), 0.3 * seed + 0.1) for seed in range(3)]
    for place in order[:2]:
        offs[place]()
    only = model()
    wear_deltas(wearer(only), delta(order[2]), 0.3 * order[2] + 0.1)
    assert torch.equal(worn[0].weight, only[0].weight)
    offs[order[2]]()
    assert all(torch.equal(worn.state_dict()[name], t) for name, t in base.state_dict().items())


def test_a_half_precision_base_comes_back_to_the_bit() -> None:
    worn = model().half()
    before = worn[0].weight.detach().clone()
    take_off = wear_deltas(wearer(worn), delta(1), 1.0)
    assert not torch.equal(worn[0].weight, before)
    take_off()
    assert worn[0].weight.dtype == torch.float16
    assert torch.equal(worn[0].weight, before)


def test_names_of_the_base_survive_layers_put_around_its_weights() -> None:
    worn = model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["0"]), worn)
    wear_deltas(wearer(worn), delta(1), 1.0)
    expected = model()[0].weight + delta(1)["delta.unet.0.weight"]
    torch.testing.assert_close(worn[0].base_layer.weight, expected)
    rows = TokenRows(nn.Embedding(4, 2), torch.zeros(1, 2), 4)
    encoder = nn.ModuleDict({"text_model": nn.ModuleDict({"token_embedding": rows})})
    assert "token_embedding.weight" in named(encoder)


def test_a_delta_of_another_base_changes_nothing() -> None:
    worn, base = model(), model()
    with pytest.raises(KeyError, match=r"unet\.7\.weight"):
        wear_deltas(wearer(worn), delta(1) | {"delta.unet.7.weight": torch.zeros(3)}, 1.0)
    assert torch.equal(worn[0].weight, base[0].weight)


def test_differences_added_to_the_base_are_what_was_trained() -> None:
    trained, base = model(), model()
    with torch.no_grad():
        trained[0].weight += 0.01
    found = differences({"unet.0.weight": trained[0].weight}, {"unet.0.weight": base[0].weight})
    worn = model()
    wear_deltas(wearer(worn), found, 1.0)
    torch.testing.assert_close(worn[0].weight, trained[0].weight, rtol=0, atol=1e-7)
