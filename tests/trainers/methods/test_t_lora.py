"""T-LoRA against the paper's W_t written out for each sample, in float64."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.func import functional_call

from lookalike_platform.conditioning import predict
from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.method_configs import TLoraConfig
from lookalike_trainers.methods.t_lora import RankMask, last_triplets, wear
from support_methods import (
    CARD,
    CPU,
    batch,
    check_every_declared_parameter_moves_and_no_other,
    check_its_file_is_the_method,
    loss_of,
    made,
    trained,
)
from support_models import RESOLUTION, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def rank_at(t: float, r: int, r_min: int) -> int:
    """The paper's r(t), with T = 1000."""
    return math.floor((r - r_min) * (1000 - t) / 1000) + r_min


def at(
    unet: Any, leaves: dict[str, dict[str, torch.Tensor]], t: float, r: int, r_min: int
) -> dict[str, torch.Tensor]:
    """W_t = W - B0 S0 M_t A0 + B S M_t A of each adapted layer."""
    shown = torch.diag((torch.arange(r) < rank_at(t, r, r_min)).double())
    return {
        f"{name}.weight": unet.get_parameter(f"{name}.weight").double()
        - f["up_0"] @ torch.diag(f["values_0"]) @ shown @ f["down_0"]
        + f["up"] @ torch.diag(f["values"]) @ shown @ f["down"]
        for name, f in leaves.items()
    }


def factors(method: Any) -> dict[str, dict[str, torch.Tensor]]:
    names = ("down", "values", "up", "down_0", "values_0", "up_0")
    return {
        name: {n: getattr(layer, n).detach().double().clone().requires_grad_() for n in names}
        for name, layer in method.layers.items()
    }


@pytest.mark.parametrize("min_rank", [None, 0, 4])
def test_loss_and_gradients_are_those_of_the_paper(base: Path, min_rank: int | None) -> None:
    """Each sample of the batch by its own timestep."""
    method, parts = trained(base, "t_lora", rank=4, min_rank=min_rank, learning_rate=1e-2)
    method.module.double()
    one = batch(method, parts, torch.float64)
    for parameter in method.module.parameters():
        parameter.grad = None
    loss = loss_of(method, one)
    loss.backward()

    unet = BaseParts(base, CPU).unet.double()
    leaves = factors(method)
    r_min = 2 if min_rank is None else min_rank
    losses = []
    for row in range(2):
        weights = at(unet, leaves, float(one.timesteps[row]), 4, r_min)
        noisy, features = one.noisy[row : row + 1], one.text.features[row : row + 1]
        predicted = functional_call(unet, weights, (noisy, one.timesteps[row], features)).sample
        losses.append(one.weight[row] * (predicted - one.target[row]).square().mean())
    expected = torch.stack(losses).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, layer in method.layers.items():
        for kind in ("down", "values", "up"):
            slope = leaves[name][kind].grad
            assert slope is not None
            scale = float(slope.abs().max())
            found = getattr(layer, kind).grad
            torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-12 * scale)


def test_training_begins_at_the_base(base: Path) -> None:
    method, parts = made(base, "t_lora", rank=4)
    one = batch(method, parts)
    plain = predict(BaseParts(base, CPU).unet, one.noisy, one.timesteps, one.text)
    assert torch.equal(one.answered_by(method.module), plain)


def test_it_begins_with_the_last_singular_triplets_of_a_random_matrix() -> None:
    torch.manual_seed(3)
    down, values, up = last_triplets(12, 20, 5)
    torch.manual_seed(3)
    u, s, vt = numpy.linalg.svd((torch.randn(12, 20) / 5).numpy(), full_matrices=False)
    numpy.testing.assert_allclose(values.numpy(), s[-5:], rtol=1e-5)
    expected = u[:, -5:] @ numpy.diag(s[-5:]) @ vt[-5:]
    numpy.testing.assert_allclose((up * values @ down).numpy(), expected, atol=1e-6)
    numpy.testing.assert_allclose((down @ down.T).numpy(), numpy.eye(5), atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 249, 250, 251, 500, 999, 333.25])
def test_the_mask_keeps_the_papers_rank(t: float) -> None:
    mask = RankMask(8, 4, 1000)
    for told in ((t, {}), (torch.tensor(t), {}), (None, {"timestep": torch.tensor([t, t])})):
        mask.see(torch.nn.Identity(), (None, told[0]), told[1])
        kept = mask(torch.ones(2, 3, 16)).reshape(2, 3, 2, 8)
        assert torch.equal(kept, (torch.arange(8) < rank_at(t, 8, 4)).float().expand_as(kept))


def test_only_the_factors_move_and_all_of_them_do(base: Path) -> None:
    check_every_declared_parameter_moves_and_no_other(base, "t_lora", rank=4)
    config = {"rank": 4, "token_vectors": 2, "gradient_checkpointing": True}
    check_every_declared_parameter_moves_and_no_other(base, "t_lora", **config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"token_vectors": 2, "targets": ("feed_forward", "to_q")},
        {"targets": ("time_emb_proj", "linear_1", "to_v")},  # layers of no sequence
    ],
)
def test_its_file_is_the_method(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    check_its_file_is_the_method(base, tmp_path, "t_lora", rank=6, **config)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_worn_it_follows_the_timestep_of_each_step(
    base: Path, tmp_path: Path, scale: float
) -> None:
    method, parts = trained(base, "t_lora", rank=4, min_rank=1)
    file = method.save(tmp_path, CARD)
    wearer, plain = BaseParts(base, CPU), BaseParts(base, CPU).unet
    wear(wearer, file, scale, "sks")
    one = batch(method, parts)
    for t in (999, 400, torch.tensor(1)):
        found = predict(wearer.unet, one.noisy, t, one.text)
        weights = {
            name: torch.lerp(plain.get_parameter(name), changed.detach().float(), scale)
            for name, changed in at(plain, factors(method), float(t), 4, 1).items()
        }
        expected = functional_call(plain, weights, (one.noisy, t, one.text.features)).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"rank": 17}, "config.rank"),
        ({"targets": ("conv1",)}, "config.targets"),
        ({"targets": ("attention", "convolution")}, "config.targets"),
        ({"targets": ("attention", "to_nothing")}, "config.targets"),
    ],
)
def test_what_the_base_has_no_room_for_is_refused_by_its_field(
    base: Path, config: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(base, "t_lora", **config)
    assert [problem.path for problem in refused.value.fields] == [field]


def test_the_smallest_rank_cannot_be_above_the_rank() -> None:
    with pytest.raises(ValueError, match="min_rank"):
        TLoraConfig(resolution=RESOLUTION, rank=4, min_rank=5)
