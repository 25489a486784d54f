"""What any method is asked in its tests: build it, train it a little, put its file on a base."""

from pathlib import Path
from typing import Any

import torch

from lookalike_platform.conditioning import encode, predict
from lookalike_platform.diffusion import decode, denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_registry.tensor_file import check_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.data import Batch
from lookalike_trainers.methods.find import builder_of, wear_of
from lookalike_trainers.methods.method import Card
from support_models import RESOLUTION, VAE_SCALE

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE
CARD = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
PROMPTS = ["a sks dog", "a dog"]


def made(base: Path, name: str, **config: Any) -> tuple[Any, BaseParts]:
    """The method on a fresh base, and what it left of the base's parts."""
    info = next(method for method in METHODS if method.name == name)
    whole = info.config(resolution=RESOLUTION, initializer="dog", **config)
    parts = BaseParts(base, CPU)
    if whole.token_vectors:
        parts.learn(whole.trigger, whole.token_vectors)
    torch.manual_seed(0)
    return builder_of(name)(parts, whole), parts


def batch(method: Any, parts: BaseParts, dtype: torch.dtype = torch.float32) -> Batch:
    """One photo's sample, and one of the class, of weight 0.7."""
    g = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 2, 4, SIDE, SIDE, generator=g, dtype=dtype)
    weight = torch.tensor([1.0, 0.7], dtype=dtype)
    text: Any = parts.ids(PROMPTS)
    if not len(method.module.text_encoders):
        text = parts.encode(PROMPTS, RESOLUTION).to("cpu", dtype)
    return Batch(noisy, torch.tensor([10, 700]), text, target, weight, whole(len(noisy)))


def one_row(rows: torch.Tensor) -> torch.Tensor:
    """Where one learned row starts for a word of several tokens: their rows' mean, as long as
    they are on average."""
    mean = rows.float().mean(0)
    return mean * rows.float().square().sum(1).sqrt().mean() / mean.square().sum().sqrt()


def whole(count: int) -> torch.Tensor:
    """What SDXL is told of pictures that nothing was cut from: [count, 6]."""
    return torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * count)


def loss_of(method: Any, one: Batch) -> torch.Tensor:
    loss: torch.Tensor = method.loss(one.answered_by(method.module), one)
    return loss


def trained(base: Path, name: str, steps: int = 3, **config: Any) -> tuple[Any, BaseParts]:
    """Optimised a few steps, fast enough to show in every picture."""
    rates = {"learning_rate": 2e-2, "text_encoder_learning_rate": 2e-2, "token_learning_rate": 0.1}
    method, parts = made(base, name, **{**rates, **config})
    optimizer = torch.optim.AdamW(method.parameter_groups())
    one = batch(method, parts)
    for _ in range(steps):
        loss_of(method, one).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.module.eval()
    return method, parts


def check_every_declared_parameter_moves_and_no_other(base: Path, name: str, **config: Any) -> None:
    before = {
        n: p.detach().clone() for n, p in made(base, name, **config)[0].module.named_parameters()
    }
    method, _ = trained(base, name, **config)
    after = dict(method.module.named_parameters())
    declared = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert {id(p) for p in after.values() if p.requires_grad} == declared
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in after.items() if id(p) in declared}


def check_its_file_is_the_method(
    base: Path, folder: Path, name: str, *, rounds: bool = False, **config: Any
) -> Path:
    """Worn, the base answers and paints as the trained module; off, or at scale 0, as the base.

    rounds: at scale 0 but for rounding.
    """
    method, parts = trained(base, name, **config)
    file = method.save(folder, CARD)
    check_tensors(file, base)
    encoders = list(method.module.text_encoders) or parts.text_encoders
    expected = _answers(method.module.unet, encoders, parts)

    wearer = BaseParts(base, CPU)
    plain = _answers(wearer.unet, wearer.text_encoders, wearer, ["a dog", ""])
    kept = _state(wearer)
    take_off = wear_of(name)(wearer, file, 1.0, "sks")
    worn = _answers(wearer.unet, wearer.text_encoders, wearer)
    torch.testing.assert_close(worn["prediction"], expected["prediction"], rtol=1e-4, atol=1e-5)
    # 8-bit colours: rounding may go either way.
    assert (worn["pixels"] - expected["pixels"]).abs().max() <= 1
    off = BaseParts(base, CPU)
    changed = _answers(off.unet, off.text_encoders, off)
    assert not torch.allclose(worn["prediction"], changed["prediction"], atol=1e-3)
    take_off()
    assert not wearer.learned
    _equal(_answers(wearer.unet, wearer.text_encoders, wearer, ["a dog", ""]), plain)
    _equal(_state(wearer), kept)

    take_off = wear_of(name)(wearer, file, 0.0, "sks")
    idle = _answers(wearer.unet, wearer.text_encoders, wearer, ["a dog", ""])
    torch.testing.assert_close(idle["prediction"], plain["prediction"])
    if not rounds:
        _equal(idle, plain)
    take_off()
    _equal(_state(wearer), kept)
    return Path(file)


def _answers(
    unet: Any, encoders: Any, parts: BaseParts, prompts: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """A prediction for two prompts, and the pixels of a picture of the first."""
    with torch.inference_mode():
        text = encode(encoders, parts.ids(prompts or PROMPTS), RESOLUTION)
        start, generators = noise([5], 4, SIDE, SIDE)
        prediction = predict(unet, start.expand(2, -1, -1, -1), torch.tensor([10, 700]), text)
        sampler = make_sampler("ddim", dict(parts.scheduler.config))
        latents = denoise(
            *(unet, sampler, start, generators, text[:1], text[1:]), steps=3, guidance_scale=3.0
        )
        (picture,) = decode(parts.vae, latents)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
    return {"prediction": prediction, "pixels": pixels}


def _state(parts: BaseParts) -> dict[str, torch.Tensor]:
    models = {"unet": parts.unet, **dict(enumerate(parts.text_encoders)), "vae": parts.vae}
    return {
        f"{part}.{name}": tensor.clone()
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
    }


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
