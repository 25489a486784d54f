"""DiffFit against its formula in float64: scales written into the layers' own outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.diff_fit import wear
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
from support_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "base")


class Scaled(nn.Module):
    """A layer, and gamma times what it says; one gamma a channel."""

    def __init__(self, layer: nn.Module, channels: int, dim: int) -> None:
        super().__init__()
        self.layer = layer
        shape = [1] * dim
        shape[1 if dim == 4 else -1] = channels
        self.gamma = nn.Parameter(torch.ones(shape, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * self.layer(x)


def naive(base: Path) -> tuple[Any, dict[str, nn.Parameter]]:
    """diffusers' UNet with its blocks' ends scaled; its knobs by our names."""
    unet = BaseParts(base, CPU).unet.double()
    knobs: dict[str, nn.Parameter] = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            knobs[f"{name}.weight"] = module.weight
        if getattr(module, "bias", None) is not None:
            knobs[f"{name}.bias"] = module.bias
        match type(module).__name__:
            case "BasicTransformerBlock":
                for attention in (module.attn1, module.attn2):
                    attention.to_out[0] = Scaled(attention.to_out[0], attention.out_dim, 3)
                last = module.ff.net[2]
                module.ff.net[2] = Scaled(last, last.out_features, 3)
                for place, layer in (
                    ("attn1.to_out.0", module.attn1.to_out[0]),
                    ("attn2.to_out.0", module.attn2.to_out[0]),
                    ("ff.net.2", module.ff.net[2]),
                ):
                    knobs[f"{name}.{place}.gamma"] = layer.gamma
            case "ResnetBlock2D":
                module.conv2 = Scaled(module.conv2, module.out_channels, 4)
                knobs[f"{name}.conv2.gamma"] = module.conv2.gamma
    for knob in knobs.values():
        knob.requires_grad_(True)
    return unet, knobs


def test_loss_and_gradient_are_the_papers_formulas(base: Path) -> None:
    method, parts = made(base, "diff_fit")
    method.module.double()
    ours = {n: p for n, p in method.module.unet.named_parameters() if p.requires_grad}
    unet, theirs = naive(base)
    assert set(ours) == set(theirs)
    for number, (name, knob) in enumerate(ours.items()):
        drawn = torch.randn(
            knob.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64
        )
        knob.data += 0.3 * drawn
        theirs[name].data += 0.3 * drawn.view_as(theirs[name])
    one = batch(method, parts, torch.float64)
    loss = loss_of(method, one)
    loss.backward()
    predicted = unet(one.noisy, one.timesteps, one.text.features)[0]
    expected = (one.weight * (predicted - one.target).square().flatten(1).mean(1)).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, knob in ours.items():
        slope = theirs[name].grad.view_as(knob)
        scale = float(slope.abs().max())
        torch.testing.assert_close(knob.grad, slope, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("config", [{}, {"train_text_encoder": True, "token_vectors": 2}])
def test_every_knob_moves_and_nothing_else(base: Path, config: dict[str, Any]) -> None:
    check_every_declared_parameter_moves_and_no_other(base, "diff_fit", **config)


@pytest.mark.parametrize("config", [{}, {"train_text_encoder": True, "token_vectors": 2}])
def test_its_file_is_the_method_and_comes_off_without_a_trace(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    check_its_file_is_the_method(base, tmp_path, "diff_fit", **config)


def test_the_file_holds_vectors_only(base: Path, tmp_path: Path) -> None:
    file = trained(base, "diff_fit")[0].save(tmp_path, CARD)
    assert all(len(tensor.shape) == 1 for tensor in read_header(file).tensors.values())


def test_a_gamma_of_another_base_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    file = trained(base, "diff_fit")[0].save(tmp_path, CARD)
    tensors = load_file(file) | {"diff_fit.unet.mid_block.attentions.0.nothing": torch.ones(3)}
    save_file(tensors, file, read_header(file).metadata)
    with pytest.raises(InvalidRequest) as refused:
        wear(BaseParts(base, CPU), file, 1.0, "sks")
    assert [field.path for field in refused.value.fields] == [
        "diff_fit.unet.mid_block.attentions.0.nothing"
    ]
