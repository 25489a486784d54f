"""SVDiff against NumPy's singular values put together again in float64, by the paper's formula."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lookalike_registry.spectra import decompose
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.svdiff import Spectrum
from support_methods import (
    CPU,
    batch,
    check_every_declared_parameter_moves_and_no_other,
    check_its_file_is_the_method,
    loss_of,
    made,
)
from support_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "base")


def naive(
    base: Path, shifts: dict[str, torch.Tensor], one: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by W' = U diag(relu(S + delta)) V^T, all in float64."""
    unet = BaseParts(base, CPU).unet.double()
    deltas = {name: shift.detach().double().requires_grad_() for name, shift in shifts.items()}
    weights = {}
    for name, delta in deltas.items():
        weight = unet.get_parameter(name)
        matrix = weight.reshape(len(weight), -1).numpy()
        u, s, vt = (torch.from_numpy(f) for f in numpy.linalg.svd(matrix, full_matrices=False))
        weights[name] = (u @ torch.diag(torch.relu(s + delta)) @ vt).reshape(weight.shape)
    predicted = functional_call(
        unet, weights, (one.noisy, one.timesteps, one.text.features), {"return_dict": False}
    )[0]
    loss = (one.weight * (predicted - one.target).square().flatten(1).mean(1)).sum()
    loss.backward()
    return loss.detach(), {name: delta.grad for name, delta in deltas.items()}


def test_loss_and_gradient_are_the_papers_formulas(base: Path) -> None:
    method, parts = made(base, "svdiff")
    method.module.double()
    spectra = {
        name.removesuffix(".parametrizations.weight.0") + ".weight": module
        for name, module in method.module.unet.named_modules()
        if isinstance(module, Spectrum)
    }
    own = BaseParts(base, CPU).unet.double()
    for number, (name, spectrum) in enumerate(spectra.items()):
        # The factors are kept in float32, too coarse to compare by; the formula is the subject.
        weight = own.get_parameter(name).flatten(1)
        factors = torch.linalg.svd(weight, full_matrices=False)
        spectrum.u, spectrum.s, spectrum.vt = factors
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(len(spectrum.s), generator=generator, dtype=torch.float64)
        spectrum.delta.data = drawn * spectrum.s.max() / 4  # some below -S: relu acts
    assert any((spectrum.s + spectrum.delta < 0).any() for spectrum in spectra.values())
    one = batch(method, parts, torch.float64)
    loss = loss_of(method, one)
    loss.backward()
    expected, slopes = naive(base, {n: s.delta for n, s in spectra.items()}, one)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, spectrum in spectra.items():
        slope = slopes[name]
        scale = float(slope.abs().max())
        torch.testing.assert_close(spectrum.delta.grad, slope, rtol=1e-10, atol=1e-12 * scale)


def test_it_trains_in_bf16_as_in_float32(base: Path) -> None:
    losses = []
    for precision in ("no", "bf16"):
        method, parts = made(base, "svdiff", mixed_precision=precision)
        loss = loss_of(method, batch(method, parts))
        loss.backward()
        assert all(shift.grad.abs().any() for shift in method.unet_shifts.values())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8), (5, 3, 3, 3), (40, 2, 3, 3)])
def test_the_factors_are_the_singular_value_decomposition(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vt = decompose(weight, None)
    matrix = weight.flatten(1)
    reference = numpy.linalg.svd(matrix.double().numpy(), compute_uv=False)
    numpy.testing.assert_allclose(s.numpy(), reference, rtol=1e-6)
    torch.testing.assert_close((u * s) @ vt, matrix, rtol=1e-5, atol=1e-5)
    ones = torch.eye(len(s))
    torch.testing.assert_close(u.T @ u, ones, rtol=0, atol=1e-6)
    torch.testing.assert_close(vt @ vt.T, ones, rtol=0, atol=1e-6)


def test_a_matrix_without_full_rank_is_decomposed_too() -> None:
    weight = torch.outer(torch.arange(4.0), torch.ones(7))
    u, s, vt = decompose(weight, None)
    torch.testing.assert_close((u * s) @ vt, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vt @ vt.T, torch.eye(4), rtol=0, atol=1e-6)


def test_a_decomposition_is_computed_once_and_kept_under_the_weights_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(4, 9)
    first = decompose(weight, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", None)
        again = decompose(weight.clone(), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = decompose(weight + 1e-3, tmp_path)
    assert not torch.equal(other[1], first[1])


def test_an_untrained_spectrum_leaves_the_base_to_the_bit(base: Path) -> None:
    method, parts = made(base, "svdiff")
    one = batch(method, parts)
    with torch.no_grad():
        ours = one.answered_by(method.module)
        own = BaseParts(base, CPU).unet(one.noisy, one.timesteps, one.text.features)[0]
    assert torch.equal(ours, own)


def test_each_matrix_is_multiplied_out_once_in_a_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, parts = made(base, "svdiff")
    calls: list[nn.Module] = []
    forward = Spectrum.forward
    monkeypatch.setattr(
        Spectrum, "forward", lambda self, weight: calls.append(self) or forward(self, weight)
    )
    loss_of(method, batch(method, parts)).backward()
    assert len(calls) == len(set(map(id, calls))) == len(method.unet_shifts)


@pytest.mark.parametrize("config", [{}, {"train_text_encoder": True, "token_vectors": 2}])
def test_every_shift_moves_and_nothing_else(base: Path, config: dict[str, Any]) -> None:
    check_every_declared_parameter_moves_and_no_other(base, "svdiff", **config)


@pytest.mark.parametrize("config", [{}, {"train_text_encoder": True, "token_vectors": 2}])
def test_its_file_is_the_method_and_comes_off_without_a_trace(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    check_its_file_is_the_method(base, tmp_path, "svdiff", **config)
