"""Custom Diffusion against diffusers' own attention processor of it, in float64."""

import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from transformers import CLIPTextModel

from lookalike_platform.conditioning import Text
from lookalike_registry.tensor_file import check_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import Batch
from lookalike_trainers.method_configs import CustomDiffusionConfig
from lookalike_trainers.methods.custom_diffusion import CustomDiffusion, build, wear
from lookalike_trainers.methods.method import Card
from lookalike_trainers.prepare import prepare
from lookalike_trainers.rare_tokens import rare_words
from lookalike_trainers.run_request import MoreSubject
from lookalike_trainers.subjects import subjects_of
from support_images import photo
from support_methods import one_row, whole
from support_models import RESOLUTION, VAE_SCALE, WIDTH, save_base
from support_ranks import run_request

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE
CARD = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
PROMPTS = ["a sks dog", "a dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "base")


def made(base: Path, **config: Any) -> tuple[CustomDiffusion, BaseParts]:
    whole = CustomDiffusionConfig(resolution=RESOLUTION, initializer="ktn", **config)
    parts = BaseParts(base, CPU)
    if whole.token_vectors:
        parts.learn(whole.trigger, whole.token_vectors)
    return build(parts, whole), parts


def batch(parts: BaseParts, dtype: torch.dtype = torch.float32) -> Batch:
    """One photo's sample, and one of the class, of weight 0.7."""
    g = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 2, 4, SIDE, SIDE, generator=g, dtype=dtype)
    weight = torch.tensor([1.0, 0.7], dtype=dtype)
    return Batch(
        noisy, torch.tensor([10, 700]), parts.ids(PROMPTS), target, weight, whole(len(noisy))
    )


def trained(base: Path, steps: int = 3, **config: Any) -> tuple[CustomDiffusion, BaseParts]:
    method, parts = made(base, learning_rate=1e-2, token_learning_rate=1e-1, **config)
    optimizer = torch.optim.AdamW(method.parameter_groups())
    for _ in range(steps):
        one = batch(parts)
        method.loss(one.answered_by(method.module), one).backward()
        optimizer.step()
        optimizer.zero_grad()
    return method, parts


def naive(base: Path, one: Batch) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, and its gradients by parameter and for the new word's row, as diffusers trains them."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").double()
    unet.requires_grad_(False)
    own = unet.state_dict()
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        if layer.endswith("attn1"):
            processors[name] = AttnProcessor()
            continue
        width = own[f"{layer}.to_k.weight"].shape[0]
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=True, train_q_out=False, hidden_size=width, cross_attention_dim=WIDTH
        ).double()
        for side in ("to_k", "to_v"):
            theirs = getattr(processors[name], f"{side}_custom_diffusion").weight
            theirs.data.copy_(own[f"{layer}.{side}.weight"])
    unet.set_attn_processor(dict(processors))  # it takes them out of the one given

    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").double()
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings()
    letters = BaseParts(base, CPU).tokenizers[0]("ktn", add_special_tokens=False).input_ids
    row = one_row(table.weight[letters])[None].double()
    table.weight = torch.nn.Parameter(torch.cat([table.weight, row]))

    assert isinstance(one.text, torch.Tensor)
    features = encoder(one.text[:, 0]).last_hidden_state
    prediction = unet(one.noisy, one.timesteps, features).sample
    errors = (prediction - one.target).square().mean(dim=(1, 2, 3))
    loss = errors[0] + 0.7 * errors[1]
    loss.backward()
    slopes = {
        f"{name.removesuffix('.processor')}.{side}.weight": getattr(
            processor, f"{side}_custom_diffusion"
        ).weight.grad
        for name, processor in processors.items()
        if isinstance(processor, CustomDiffusionAttnProcessor)
        for side in ("to_k", "to_v")
    }
    assert table.weight.grad is not None
    return float(loss.detach()), slopes, table.weight.grad[-1:]


def test_loss_and_gradients_are_those_of_diffusers_processor(base: Path) -> None:
    method, parts = made(base)
    method.module.double()
    one = batch(parts, torch.float64)
    loss = method.loss(one.answered_by(method.module), one)
    loss.backward()
    expected, slopes, row = naive(base, one)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    ours = {n: p.grad for n, p in method.module.unet.named_parameters() if p.requires_grad}
    assert ours.keys() == slopes.keys()
    for name, slope in slopes.items():
        size = float(slope.abs().max())
        torch.testing.assert_close(ours[name], slope, rtol=1e-7, atol=1e-7 * size)
    size = float(row.abs().max())
    torch.testing.assert_close(method.words[0][0].rows.grad, row, rtol=1e-7, atol=1e-7 * size)


def test_keys_values_and_the_word_move_and_nothing_else(base: Path) -> None:
    fresh = BaseParts(base, CPU)
    before = dict(fresh.unet.named_parameters()) | dict(fresh.text_encoders[0].named_parameters())
    method, _ = trained(base)
    after = dict(method.module.unet.named_parameters())
    text = {
        name.replace(".table.", "."): p
        for name, p in method.module.text_encoders[0].named_parameters()
    }
    rows = text.pop(next(name for name in text if name.endswith(".rows")))
    start = BaseParts(base, CPU).tokenizers[0]("ktn", add_special_tokens=False).input_ids
    table = text["embeddings.token_embedding.weight"]
    assert not torch.isclose(rows, one_row(table[start]), rtol=0, atol=1e-4).any()
    moved = {n for n, p in (after | text).items() if not torch.equal(p, before[n])}
    assert moved == {n for n in after if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert moved


def test_its_file_worn_on_the_base_says_what_the_trained_module_does(
    base: Path, tmp_path: Path
) -> None:
    method, parts = trained(base, token_vectors=2)
    file = method.save(tmp_path, CARD)
    check_tensors(file, base)
    one = batch(parts)
    with torch.no_grad():
        expected = one.answered_by(method.module)

    worn = BaseParts(base, CPU)
    untouched = BaseParts(base, CPU)

    def says(on: BaseParts, prompts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            text = on.encode(prompts, RESOLUTION)
            answer: torch.Tensor = on.unet(one.noisy, one.timesteps, text.features).sample
        return answer

    take_off = wear(worn, file, 1.0, "mine-7")
    torch.testing.assert_close(
        says(worn, ["a mine-7 dog", "a dog"]), expected, rtol=1e-5, atol=1e-6
    )
    assert not torch.equal(says(worn, PROMPTS), says(untouched, PROMPTS))
    take_off()
    assert worn.learned == {}
    assert torch.equal(says(worn, PROMPTS), says(untouched, PROMPTS))
    for mine, own in (
        (worn.unet, untouched.unet),
        (worn.text_encoders[0], untouched.text_encoders[0]),
    ):
        assert mine.state_dict().keys() == own.state_dict().keys()
        assert all(torch.equal(p, own.state_dict()[n]) for n, p in mine.state_dict().items())

    take_off = wear(worn, file, 0.0, "mine-7")
    assert torch.equal(says(worn, PROMPTS), says(untouched, PROMPTS))
    take_off()


def test_without_a_word_of_its_own_no_text_encoder_is_needed(base: Path, tmp_path: Path) -> None:
    method, _ = made(base, token_vectors=0)
    text = Text(torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1)))
    asked = (torch.zeros(2, 4, SIDE, SIDE), torch.tensor([1, 2]), text, whole(2))
    assert method.module(*asked).shape[0] == 2
    assert len(method.module.text_encoders) == 0
    header = check_tensors(method.save(tmp_path, CARD), base)
    assert all(key.startswith("delta.unet.") for key in header.tensors)


def test_with_several_subjects_every_word_is_learned_the_last_one_too(
    base: Path, tmp_path: Path
) -> None:
    """Elsewhere the gradient of all words but those up to the last is kept: off by one."""
    folder = tmp_path / "run"
    shutil.copytree(base, folder / "base")
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    config = CustomDiffusionConfig.model_validate(
        {
            "resolution": RESOLUTION,
            "initializer": "ktn",
            "batch_size": 3,
            "caption_dropout": 0.0,
            "sizes": 2,
            "token_learning_rate": 0.1,
            "prior": {"num_images": 1, "steps": 1, "sampler": "ddim"},
            "also": ["set_2", "set_3"],
        }
    )
    request = run_request(folder, config, method="custom_diffusion")
    first, second, third = request.images
    request = request.model_copy(
        update={
            "images": [first],
            "also": [
                MoreSubject(class_noun="cat", images=[second]),
                MoreSubject(class_noun="dog", images=[third]),
            ],
        }
    )
    parts = BaseParts(folder / "base", CPU)
    for subject in subjects_of(request, config):
        parts.learn(subject.config.trigger, 1)
    data, _ = prepare(request, config, parts, lambda message: None)
    (bucket,) = data.buckets
    assert (len(bucket.photos), len(bucket.class_images)) == (3, 2)  # a dog and a cat

    method = build(parts, config)
    starts = [word.rows.detach().clone() for (word,) in method.words]
    table = method.module.text_encoders[0].get_input_embeddings().weight
    rare = [word for word in rare_words(parts.folder) if word != "ktn"]
    for start, rarest in zip(starts[1:], cycle(rare), strict=False):
        (token,) = parts.tokenizers[0](rarest, add_special_tokens=False).input_ids
        torch.testing.assert_close(start, table[[token]])
    optimizer = torch.optim.AdamW(method.parameter_groups())
    one = data.batch(0, 0, 0, 1)  # of one photo each
    method.loss(one.answered_by(method.module), one).backward()
    optimizer.step()
    assert len(method.words) == 3
    for (word,), start in zip(method.words, starts, strict=True):
        assert not torch.isclose(word.rows, start, rtol=0, atol=1e-4).any()

    file = method.save(tmp_path, CARD)
    check_tensors(file, base)
    worn = BaseParts(base, CPU)
    take_off = wear(worn, file, 1.0, "mine")
    theirs = parts.ids(["a sks dog", "a sks-2 cat", "a sks-3 dog"])
    with torch.no_grad():
        expected = method.module.text_encoders[0](theirs[:, 0])[0]
        found = worn.encode(["a mine dog", "a mine-2 cat", "a mine-3 dog"], RESOLUTION).features
    torch.testing.assert_close(found, expected)
    take_off()
    assert worn.learned == {}
