"""SSR-Merge against the least-squares problem it claims to solve."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lookalike_registry.compose.low_rank import LowRank
from lookalike_registry.compose.routing import RIDGE, Router

OUT, WIDTH = 10, 16
RANKS = (2, 3, 1)
EXACT = 1e-6  # as ridge: the least-squares problem as it stands


def subjects(ranks: tuple[int, ...] = RANKS) -> tuple[list[LowRank], list[Tensor]]:
    """LoRAs and each subject's inputs [tokens, in], mostly in a few directions of its own."""
    torch.manual_seed(0)
    pairs = [LowRank(torch.randn(OUT, rank), torch.randn(rank, WIDTH)) for rank in ranks]
    spread = [torch.randn(4, WIDTH) for _ in ranks]
    inputs = [torch.randn(30, 4) @ own + 0.05 * torch.randn(30, WIDTH) for own in spread]
    return pairs, inputs


def routed(pairs: list[LowRank], inputs: list[Tensor], ridge: float = EXACT) -> Tensor:
    router = Router(pairs, ridge)
    for subject, seen in enumerate(inputs):
        router.observe(subject, seen)
    return router.merged().dense()


def strangeness(merged: Tensor, pairs: list[LowRank], inputs: list[Tensor]) -> float:
    """How far the merged LoRA is from each subject's own, on the subject's own inputs."""
    off = [
        (seen @ (merged - pair.dense()).T).norm() ** 2
        for pair, seen in zip(pairs, inputs, strict=True)
    ]
    return float(sum(off)) ** 0.5


def test_the_router_is_the_least_squares_one() -> None:
    pairs, inputs = subjects()
    signals = [seen.double() @ torch.cat([p.down for p in pairs]).double().T for seen in inputs]
    wanted = []
    for subject, signal in enumerate(signals):
        start = sum(RANKS[:subject])
        own = torch.zeros_like(signal)
        own[:, start : start + RANKS[subject]] = signal[:, start : start + RANKS[subject]]
        wanted.append(own)
    router = np.linalg.lstsq(torch.cat(signals).numpy(), torch.cat(wanted).numpy())[0].T
    up, down = torch.cat([p.up for p in pairs], 1), torch.cat([p.down for p in pairs])
    expected = up.double().numpy() @ router @ down.double().numpy()
    np.testing.assert_allclose(routed(pairs, inputs), expected, rtol=1e-4, atol=1e-4)


def test_each_subject_keeps_more_of_itself_than_in_the_plain_sum() -> None:
    pairs, inputs = subjects()
    plain = torch.stack([pair.dense() for pair in pairs]).sum(0)
    assert strangeness(routed(pairs, inputs), pairs, inputs) < 0.5 * strangeness(
        plain, pairs, inputs
    )


def test_with_a_ridge_it_is_the_least_squares_router_that_is_held_near_the_plain_sum() -> None:
    pairs, inputs = subjects()
    down = torch.cat([p.down for p in pairs]).double()
    signals = [seen.double() @ down.T for seen in inputs]
    starts = [sum(RANKS[:subject]) for subject in range(len(RANKS))]
    wanted = torch.cat(
        [
            signal * (torch.arange(sum(RANKS)) >= start) * (torch.arange(sum(RANKS)) < start + r)
            for signal, start, r in zip(signals, starts, RANKS, strict=True)
        ]
    )
    together = torch.cat(signals)
    held = RIDGE**0.5 * together.norm(dim=0).diag()  # ridge ||(R - I) D^½||²
    rows, targets = torch.cat([together, held]), torch.cat([wanted, held])
    router = np.linalg.lstsq(rows.numpy(), targets.numpy())[0].T
    up = torch.cat([p.up for p in pairs], 1).double().numpy()
    expected = up @ router @ down.numpy()
    np.testing.assert_allclose(routed(pairs, inputs, RIDGE), expected, rtol=1e-4, atol=1e-4)


def test_signals_that_never_meet_are_routed_without_loss() -> None:
    pairs, _ = subjects((2, 2))
    basis = torch.linalg.qr(torch.randn(WIDTH, 8))[0].T
    inputs = [torch.randn(20, 2) @ basis[:2], torch.randn(20, 2) @ basis[2:4]]
    assert strangeness(routed(pairs, inputs), pairs, inputs) < 1e-2


def test_one_subject_alone_is_left_as_it_is() -> None:
    [pair], [inputs] = subjects((3,))
    merged = routed([pair], [inputs], RIDGE)
    torch.testing.assert_close(merged, pair.dense(), rtol=1e-4, atol=1e-4)


def test_inputs_may_come_in_any_order_and_in_parts() -> None:
    pairs, inputs = subjects()
    router = Router(pairs, EXACT)
    for subject in (2, 0, 1):
        for part in inputs[subject].view(5, 2, 3, WIDTH):
            router.observe(subject, part)
    torch.testing.assert_close(router.merged().dense(), routed(pairs, inputs), rtol=1e-4, atol=1e-4)


def test_how_a_lora_splits_its_scale_does_not_matter() -> None:
    pairs, inputs = subjects()
    other = [LowRank(pairs[0].up * 1000, pairs[0].down / 1000), *pairs[1:]]
    torch.testing.assert_close(routed(other, inputs), routed(pairs, inputs), rtol=1e-3, atol=1e-3)


def test_what_tells_subjects_apart_by_chance_is_not_enlarged() -> None:
    """Two subjects that hear nearly the same, and little of it."""
    pairs, [inputs, _] = subjects((2, 2))
    alike = [inputs[:2], inputs[:2] + 1e-2 * torch.randn_like(inputs[:2])]
    plain = torch.stack([pair.dense() for pair in pairs]).sum(0).norm()
    assert routed(pairs, alike, EXACT).norm() > 3 * plain
    assert routed(pairs, alike, RIDGE).norm() < 1.1 * plain


def test_a_convolution_is_routed_by_its_patches() -> None:
    torch.manual_seed(0)
    pairs = [LowRank(torch.randn(4, 2), torch.randn(2, 3, 3, 3)) for _ in range(2)]
    images = torch.randn(2, 5, 3, 8, 8)
    router = Router(pairs)
    for subject, seen in enumerate(images):
        router.observe(subject, torch.nn.functional.unfold(seen, 3).transpose(1, 2))
    merged = router.merged()
    assert merged.down.shape == (4, 3, 3, 3)

    def answer(pair: LowRank, seen: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(seen, pair.dense())

    for pair, seen in zip(pairs, images, strict=True):
        off = (answer(merged, seen) - answer(pair, seen)).norm()
        assert off < answer(pair, seen).norm()


def test_the_same_lora_twice_and_a_dead_row_stay_finite() -> None:
    [pair], [inputs] = subjects((3,))
    dead = LowRank(pair.up, pair.down * torch.tensor([[1.0], [1.0], [0.0]]))
    merged = routed([dead, dead], [inputs, inputs])
    torch.testing.assert_close(merged, dead.dense(), rtol=1e-3, atol=1e-3)


def test_a_subject_that_was_never_observed_is_not_silenced() -> None:
    pairs, inputs = subjects()
    router = Router(pairs)
    router.observe(1, inputs[1])
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        router.merged()
