"""The moving average of the weights against its formula, step by step."""

import torch
from torch import nn

from lookalike_trainers.average import Average


def trained() -> tuple[nn.Module, Average]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    return module, Average(module, 0.6)


def step(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module[1].parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_is_the_recursion_written_out_and_forgets_the_start_quickly() -> None:
    module, average = trained()
    naive = module[1].weight.detach().double()
    for n in range(1, 12):
        step(module)
        average.update()
        decay = min(0.6, (1 + n) / (10 + n))
        naive = decay * naive + (1 - decay) * module[1].weight.detach().double()
        torch.testing.assert_close(average.whole("1.weight").double(), naive, rtol=1e-5, atol=1e-6)
    assert decay == (1 + 11) / (10 + 11) < 0.6


def test_inside_the_weights_are_the_averages_and_afterwards_to_the_bit_what_they_were() -> None:
    module, average = trained()
    step(module)
    average.update()
    before = [p.detach().clone() for p in module.parameters()]
    with average.in_place():
        assert torch.equal(module[1].weight, average.whole("1.weight"))
        assert not torch.equal(module[1].weight, before[2])
        assert torch.equal(module[0].weight, before[0])
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_it_goes_on_where_it_was() -> None:
    module, average = trained()
    for _ in range(3):
        step(module)
        average.update()
    again = Average(module, 0.6)
    again.load(3, {f"1.{name}": average.whole(f"1.{name}").clone() for name in ("weight", "bias")})
    step(module)
    average.update()
    again.update()
    assert torch.equal(again.whole("1.weight"), average.whole("1.weight"))
