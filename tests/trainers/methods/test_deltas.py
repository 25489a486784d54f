"""Deltas on a base in memory: what they add, and that nothing of them stays."""

import peft
import pytest
import torch
from torch import nn

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.methods.deltas import add_deltas, base_name, differences
from lookalike_trainers.methods.tokens import TokenRows


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


def delta(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.randn((3, 3), generator=torch.Generator().manual_seed(seed))
    return {"unet.0.weight": drawn}


def test_scaled_deltas_add_up() -> None:
    worn, base = model(), model()
    add_deltas({"unet": worn}, delta(1), 0.5)
    add_deltas({"unet": worn}, delta(2), -2.0)
    expected = base[0].weight + 0.5 * delta(1)["unet.0.weight"] - 2 * delta(2)["unet.0.weight"]
    torch.testing.assert_close(worn[0].weight, expected)
    assert torch.equal(worn[1].weight, base[1].weight)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_they_come_off_in_any_order_and_leave_the_base_to_the_bit(order: tuple[int, ...]) -> None:
    worn, base = model(), model()
    offs = [add_deltas({"unet": worn}, delta(seed), 0.3 * seed + 0.1) for seed in range(3)]
    for place in order[:2]:
        offs[place]()
    only = model()
    add_deltas({"unet": only}, delta(order[2]), 0.3 * order[2] + 0.1)
    assert torch.equal(worn[0].weight, only[0].weight)
    offs[order[2]]()
    assert all(torch.equal(worn.state_dict()[name], t) for name, t in base.state_dict().items())


def test_a_half_precision_base_comes_back_to_the_bit() -> None:
    worn = model().half()
    before = worn[0].weight.detach().clone()
    take_off = add_deltas({"unet": worn}, delta(1), 1.0)
    assert not torch.equal(worn[0].weight, before)
    take_off()
    assert worn[0].weight.dtype == torch.float16
    assert torch.equal(worn[0].weight, before)


def test_names_of_the_base_survive_layers_put_around_its_weights() -> None:
    worn = model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["0"]), worn)
    add_deltas({"unet": worn}, delta(1), 1.0)
    expected = model()[0].weight + delta(1)["unet.0.weight"]
    torch.testing.assert_close(worn[0].base_layer.weight, expected)
    rows = nn.ModuleDict({"token_embedding": TokenRows(nn.Embedding(4, 2), torch.zeros(1, 2), 4)})
    names = [base_name(f"text_model.embeddings.{name}") for name, _ in rows.named_parameters()]
    assert "embeddings.token_embedding.weight" in names


def test_a_delta_of_another_base_is_refused_and_changes_nothing() -> None:
    worn, base = model(), model()
    foreign = delta(1) | {"unet.7.weight": torch.zeros(3), "unet.0.bias": torch.zeros(9)}
    with pytest.raises(InvalidRequest) as refused:
        add_deltas({"unet": worn}, foreign, 1.0)
    assert [field.path for field in refused.value.fields] == ["unet.7.weight", "unet.0.bias"]
    assert torch.equal(worn[0].weight, base[0].weight)


def test_differences_added_to_the_base_are_what_was_trained() -> None:
    trained, base = model(), model()
    with torch.no_grad():
        trained[0].weight += 0.01
    named = {"unet.0.weight": trained[0].weight}
    found = differences(named, {"unet.0.weight": base[0].weight})
    worn = model()
    add_deltas({"unet": worn}, {"unet.0.weight": found["delta.unet.0.weight"]}, 1.0)
    torch.testing.assert_close(worn[0].weight, trained[0].weight, rtol=0, atol=1e-7)
