"""LoRA as a method: what trains, and that its file means the same to plain diffusers."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import make_sampler
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import LoraConfig
from lookalike_trainers.methods.lora import Lora, build
from lookalike_trainers.methods.method import Card
from support_models import RESOLUTION, TOKENS, VAE_SCALE, WIDTH, save_base

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp(request.param), request.param)


def lora(base: Path, **config: Any) -> Lora:
    torch.manual_seed(0)
    return build(BaseParts(base, CPU), LoraConfig(resolution=RESOLUTION, **config))


def learned(method: Lora) -> Lora:
    """As if trained: B, which starts at zero, is not zero any more."""
    with torch.no_grad():
        for name, parameter in method.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return method


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Text]:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn((2, 4, SIDE, SIDE), generator=generator)
    text = torch.randn((2, TOKENS, WIDTH), generator=generator)
    return noisy, torch.tensor([10, 900]), Text(text)


def test_an_untrained_adapter_leaves_the_base_as_it_is(base: Path) -> None:
    expected = predict(BaseParts(base, CPU).unet, *inputs())
    torch.testing.assert_close(lora(base).module(*inputs()), expected)


def test_only_the_thin_matrices_train(base: Path) -> None:
    method = lora(base, train_text_encoder=True, learning_rate=0.5, text_encoder_learning_rate=0.25)
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    trainable = {name: p for name, p in method.module.named_parameters() if p.requires_grad}
    assert {id(p) for p in grouped} == {id(p) for p in trainable.values()}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert [group["lr"] for group in method.parameter_groups()] == [0.5, 0.25]


def test_rank_and_targets_decide_the_shapes(base: Path) -> None:
    method = lora(base, rank=3, targets=("attn2.to_k", "attn2.to_v"))
    names = [name for name, p in method.module.named_parameters() if p.requires_grad]
    assert names
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in names)
    down = [p for name, p in method.module.named_parameters() if "lora_A" in name]
    assert {p.shape for p in down} == {(3, WIDTH)}


def test_targets_this_base_does_not_have_are_refused_by_their_field(base: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        lora(base, targets=("to_nothing",))
    assert [field.path for field in refused.value.fields] == ["config.targets"]


def test_gradients_are_those_of_the_written_out_product(base: Path) -> None:
    """y = W x + (alpha / rank) B A x in one layer: dL/dB = (alpha / rank) dL/dy (A x)."""
    method = lora(base, rank=2, alpha=6.0, targets=("mid_block.attentions.0.proj_in",))
    layer = method.module.unet.mid_block.attentions[0].proj_in
    seen: dict[str, torch.Tensor] = {}

    def watch(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["x"], seen["y"] = args[0].detach(), output
        output.retain_grad()

    layer.register_forward_hook(watch)
    method.module(*inputs()).square().mean().backward()
    down = layer.lora_A["default"].weight.detach().flatten(1)
    up = layer.lora_B["default"].weight
    channels = 1 if seen["x"].dim() == 4 else -1  # a 1 x 1 convolution, or a linear layer
    x = seen["x"].movedim(channels, -1).flatten(0, -2)
    slope = seen["y"].grad
    assert slope is not None
    slope = slope.movedim(channels, -1).flatten(0, -2)
    expected = (6.0 / 2) * slope.T @ (x @ down.T)
    assert up.grad is not None
    torch.testing.assert_close(up.grad.flatten(1), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_its_file_paints_the_same_image_in_plain_diffusers(
    base: Path, tmp_path: Path, train_text_encoder: bool
) -> None:
    """With alpha other than the rank, which is lost where the file does not carry it."""
    config: dict[str, Any] = {"rank": 2, "alpha": 5.0, "train_text_encoder": train_text_encoder}
    method = learned(lora(base, **config))
    method.save(tmp_path, Card("robot", "sd1", RESOLUTION, "sks", "epsilon"))

    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def diffusers_paints() -> Any:
        return pipeline(
            "a sks dog",
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
        ).images[0]

    without = diffusers_paints()
    pipeline.load_lora_weights(tmp_path, weight_name=WEIGHTS_NAME)
    theirs = diffusers_paints()

    parts = BaseParts(base, CPU)
    encoders = method.module.text_encoders or parts.text_encoders
    with torch.inference_mode():
        texts = encode(encoders, parts.ids(["a sks dog", ""]), RESOLUTION)
        start, generators = noise([5], 4, SIDE, SIDE)
        sampler = make_sampler("ddim", dict(pipeline.scheduler.config))
        latents = denoise(
            *(method.module.unet, sampler, start, generators, texts[:1], texts[1:]),
            steps=4,
            guidance_scale=3.0,
        )
        (ours,) = decode(parts.vae, latents)
    apart = numpy.abs(numpy.asarray(ours, dtype=int) - numpy.asarray(theirs, dtype=int))
    assert apart.max() <= 1
    assert theirs.tobytes() != without.tobytes()


def test_the_same_tensors_give_the_same_file(base: Path, tmp_path: Path) -> None:
    card = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (lora(base).save(tmp_path / name, card) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
