"""LoRA as a method: its formulas, what trains, and that its file means the same to diffusers."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from torch.func import functional_call

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_registry.adapter_file import WEIGHTS_NAME, check_against_base
from lookalike_registry.tensor_file import ADAPTER_NAME
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.lora import Lora, wear
from lookalike_trainers.methods.method import Card
from support_methods import (
    batch,
    check_every_declared_parameter_moves_and_no_other,
    check_its_file_is_the_method,
    loss_of,
    made,
    trained,
    whole,
)
from support_models import RESOLUTION, TOKENS, VAE_SCALE, WIDTH, save_base

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE
EVERYWHERE = ("attention", "feed_forward", "convolution", "proj_in", "conv_out")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 2, "alpha": 5.0},
    "rslora": {"rank": 4, "alpha": 3.0, "rslora": True, "train_text_encoder": True},
    "dora": {"rank": 2, "alpha": 3.0, "dora": True, "train_text_encoder": True},
    "ranks": {
        "rank": 2,
        "alpha": 3.0,
        "ranks": {"attn2.to_k": 5, "convolution": 1, "out_proj": 3},
        "targets": EVERYWHERE,
        "train_text_encoder": True,
    },
    "all": {
        "rank": 3,
        "rslora": True,
        "dora": True,
        "ranks": {"feed_forward": 4},
        "targets": EVERYWHERE,
        "train_text_encoder": True,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_base(tmp_path_factory.mktemp(family), family)
        for family in ("sd1", "sd2", "sdxl")
    }


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["sd1"]


def lora(base: Path, **config: Any) -> Lora:
    method: Lora = made(base, "lora", **config)[0]
    return method


def learned(method: Lora) -> Lora:
    """As if trained: B, which starts at zero, is not zero any more, and m not the base's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in method.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.6)
    return method


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Text]:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn((2, 4, SIDE, SIDE), generator=generator)
    text = torch.randn((2, TOKENS, WIDTH), generator=generator)
    return noisy, torch.tensor([10, 900]), Text(text)


def written_out(model: Any, plain: Any, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each W' by the papers' formulas, and the leaves A, B and m that it is made of.

    model: with PEFT's layers; plain: the same base without.
    """
    leaves = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    weights = {}
    for module in {name.partition(".lora_")[0] for name in leaves}:
        down = leaves[f"{module}.lora_A.default.weight"]
        up = leaves[f"{module}.lora_B.default.weight"]
        rank = len(down)
        # A module's alpha is to its own rank as alpha is to rank.
        alpha = (config.alpha or config.rank) / config.rank * rank
        s = alpha / rank**0.5 if config.rslora else alpha / rank
        weight = plain.get_parameter(f"{module}.weight")
        changed = weight + s * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        magnitude = leaves.get(f"{module}.lora_magnitude_vector.default.weight")
        if magnitude is not None:
            # The length is taken as a constant for the gradient: Liu et al. 2024, 4.3.
            length = changed.flatten(1).norm(dim=1).detach()
            gain = (magnitude.flatten() / length).view(-1, *(1,) * (weight.dim() - 1))
            changed = gain * changed
        weights[f"{module}.weight"] = changed
    return weights, leaves


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_papers(base: Path, kind: str) -> None:
    method, parts = made(base, "lora", **KINDS[kind])
    learned(method).module.double()
    plain = BaseParts(base, CPU)
    one = batch(method, parts, torch.float64)
    loss = loss_of(method, one)
    loss.backward()

    unet = plain.unet.double()
    weights, leaves = written_out(method.module.unet, unet, method.config)
    text: Any = one.text
    if method.config.train_text_encoder:
        encoder = plain.text_encoders[0].double()
        in_text, more = written_out(method.module.text_encoders[0], encoder, method.config)
        leaves |= {f"text.{name}": leaf for name, leaf in more.items()}
        text = Text(functional_call(encoder, in_text, (one.text[:, 0],))[0])
    predicted = functional_call(unet, weights, (one.noisy, one.timesteps, text.features)).sample
    expected = (one.weight * (predicted - one.target).square().flatten(1).mean(1)).sum()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    slopes = {name: p.grad for name, p in method.module.unet.named_parameters()}
    if method.config.train_text_encoder:
        own = method.module.text_encoders[0].named_parameters()
        slopes |= {f"text.{name}": p.grad for name, p in own}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(slopes[name], leaf.grad, rtol=1e-10, atol=1e-12 * scale)


def test_an_untrained_adapter_leaves_the_base_as_it_is(base: Path) -> None:
    expected = predict(BaseParts(base, CPU).unet, *inputs())
    for kind in ("plain", "all"):
        method = lora(base, **KINDS[kind] | {"train_text_encoder": False})
        torch.testing.assert_close(method.module(*inputs(), whole(2)), expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_declared_parameter_moves_and_no_other(
    bases: dict[str, Path], kind: str, family: str
) -> None:
    """Of SDXL's first encoder nobody reads the last layer, so it is not declared."""
    check_every_declared_parameter_moves_and_no_other(bases[family], "lora", **KINDS[kind])


def test_a_text_encoders_lora_and_rows_are_not_frozen_by_gradient_checkpointing(
    base: Path,
) -> None:
    config = {"train_text_encoder": True, "token_vectors": 2, "gradient_checkpointing": True}
    check_every_declared_parameter_moves_and_no_other(base, "lora", **config)
    with_it, without = (
        trained(base, "lora", **config | {"gradient_checkpointing": on})[0] for on in (True, False)
    )
    names = [n for n, p in with_it.module.named_parameters() if p.requires_grad]
    assert any(n.startswith("text_encoders.") and ".lora_B." in n for n in names)
    for one, other in zip(with_it.module.parameters(), without.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_parts_learn_at_their_own_rates(base: Path) -> None:
    rates = {"learning_rate": 0.5, "text_encoder_learning_rate": 0.25, "token_learning_rate": 0.1}
    method = lora(base, train_text_encoder=True, token_vectors=1, **rates)
    assert [group["lr"] for group in method.parameter_groups()] == [0.5, 0.25, 0.1]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_file_paints_the_same_image_in_plain_diffusers(
    bases: dict[str, Path], tmp_path: Path, kind: str, family: str
) -> None:
    """With alpha other than the rank, which is lost where the file does not carry it."""
    base = bases[family]
    method, parts = made(base, "lora", **KINDS[kind])
    learned(method).module.eval()
    prediction_type = "v_prediction" if family == "sd2" else "epsilon"
    file = method.save(tmp_path, Card("robot", family, RESOLUTION, "sks", prediction_type))
    check_against_base(file, base)

    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "x"}

    def diffusers_paints() -> Any:
        return pipeline(
            "a sks dog",
            height=RESOLUTION,
            width=RESOLUTION,
            generator=torch.Generator().manual_seed(5),
            **options,
        ).images[0]

    without = diffusers_paints()
    pipeline.load_lora_weights(tmp_path, weight_name=WEIGHTS_NAME)
    theirs = diffusers_paints()

    encoders = list(method.module.text_encoders) or parts.text_encoders

    def ours(unet: Any, encoders: Any) -> Any:
        with torch.inference_mode():
            texts = encode(encoders, parts.ids(["a sks dog", "x"]), RESOLUTION)
            start, generators = noise([5], 4, SIDE, SIDE)
            sampler = make_sampler("ddim", dict(pipeline.scheduler.config))
            latents = denoise(
                *(unet, sampler, start, generators, texts[:1], texts[1:]),
                steps=4,
                guidance_scale=3.0,
            )
            return decode(parts.vae, latents)[0]

    assert apart(ours(method.module.unet, encoders), theirs) <= 1
    assert theirs.tobytes() != without.tobytes()

    wearer = BaseParts(base, CPU)
    take_off = wear(wearer, file, 1.0, "sks")
    assert apart(ours(wearer.unet, wearer.text_encoders), theirs) <= 1
    take_off()
    assert ours(wearer.unet, wearer.text_encoders).tobytes() == without.tobytes()


def apart(one: Any, other: Any) -> int:
    """The largest difference of two pictures' 8-bit colours; rounding may go either way."""
    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1.5])
def test_worn_at_a_scale_it_is_that_much_of_the_change(
    base: Path, tmp_path: Path, kind: str, scale: float
) -> None:
    """W + scale (W' - W), for DoRA too, whose formula itself knows no scale."""
    config = KINDS[kind] | {"train_text_encoder": False, "ranks": {}}
    method = learned(lora(base, **config))
    file = method.save(tmp_path, Card("robot", "sd1", RESOLUTION, "sks", "epsilon"))
    plain, wearer = BaseParts(base, CPU), BaseParts(base, CPU)
    weights, _ = written_out(method.module.unet, plain.unet, method.config)
    mixed = {
        name: torch.lerp(plain.unet.get_parameter(name), changed, scale)
        for name, changed in weights.items()
    }
    noisy, timesteps, text = inputs()
    with torch.no_grad():
        expected = functional_call(plain.unet, mixed, (noisy, timesteps, text.features)).sample
        wear(wearer, file, scale, "sks")
        found = predict(wearer.unet, noisy, timesteps, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if scale == 0:
        assert torch.equal(found, predict(plain.unet, noisy, timesteps, text))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_several_add_up_and_come_off_in_any_order(
    base: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    files = []
    for number, config in enumerate(({"rank": 2}, {"dora": True}, {"targets": EVERYWHERE})):
        folder = tmp_path / str(number)
        folder.mkdir()
        card = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
        files.append(learned(lora(base, **config)).save(folder, card))
    wearer = BaseParts(base, CPU)
    bare = predict(wearer.unet, *inputs())
    offs = [wear(wearer, file, 0.5, "sks") for file in files]
    predict(wearer.unet, *inputs())
    for done, number in enumerate(order[:2]):
        offs[number]()
        left = [file for place, file in enumerate(files) if place not in order[: done + 1]]
        other = BaseParts(base, CPU)
        for file in left:
            wear(other, file, 0.5, "sks")
        expected = predict(other.unet, *inputs())
        torch.testing.assert_close(predict(wearer.unet, *inputs()), expected)
    offs[order[2]]()
    assert torch.equal(predict(wearer.unet, *inputs()), bare)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("config", [{}, {"dora": True, "targets": EVERYWHERE, "rslora": True}])
@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_with_learned_rows_its_file_is_the_method(
    bases: dict[str, Path],
    tmp_path: Path,
    config: dict[str, Any],
    family: str,
    train_text_encoder: bool,
) -> None:
    """Pivotal tuning: the word's rows and the products in one file."""
    config = config | {"token_vectors": 2, "train_text_encoder": train_text_encoder}
    file = check_its_file_is_the_method(bases[family], tmp_path, "lora", **config)
    assert file.name == ADAPTER_NAME


def test_the_same_tensors_give_the_same_file(base: Path, tmp_path: Path) -> None:
    card = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (lora(base).save(tmp_path / name, card) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_weight_decay_does_not_shrink_the_lengths_of_the_bases_rows(base: Path) -> None:
    method = lora(base, dora=True, train_text_encoder=True)
    decays = {
        id(p): group.get("weight_decay")
        for group in method.parameter_groups()
        for p in group["params"]
    }
    lengths = [p for n, p in method.module.named_parameters() if "magnitude" in n]
    thin = [p for n, p in method.module.named_parameters() if ".lora_A" in n or ".lora_B" in n]
    assert lengths
    assert {decays[id(p)] for p in lengths} == {0.0}
    assert {decays[id(p)] for p in thin} == {None}  # the run's own
