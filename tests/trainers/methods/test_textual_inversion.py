"""Textual Inversion against the paper's loss written out, in float64."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from transformers import CLIPTextModel

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.tensor_file import check_tensors
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.data import Batch
from lookalike_trainers.method_configs import TextualInversionConfig
from lookalike_trainers.methods.method import Card
from lookalike_trainers.methods.textual_inversion import TextualInversion, build, wear
from lookalike_trainers.methods.tokens import word_rows
from lookalike_trainers.templates import OBJECT, STYLE
from support_methods import one_row, whole
from support_models import RESOLUTION, VAE_SCALE, save_base

CPU = torch.device("cpu")
SIDE = RESOLUTION // VAE_SCALE
CARD = Card("robot", "sd1", RESOLUTION, "sks", "epsilon")
PROMPTS = ["a photo of a sks", "the cool sks"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def made(base: Path, **config: Any) -> tuple[TextualInversion, BaseParts]:
    whole = TextualInversionConfig(resolution=RESOLUTION, initializer="dog", **config)
    parts = BaseParts(base, CPU)
    parts.learn(whole.trigger, whole.token_vectors)
    return build(parts, whole), parts


def batch(parts: BaseParts, dtype: torch.dtype = torch.float32) -> Batch:
    g = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 2, 4, SIDE, SIDE, generator=g, dtype=dtype)
    weight = torch.tensor([0.5, 0.5], dtype=dtype)
    return Batch(
        noisy, torch.tensor([10, 700]), parts.ids(PROMPTS), target, weight, whole(len(noisy))
    )


def trained(base: Path, **config: Any) -> tuple[TextualInversion, BaseParts]:
    method, parts = made(base, token_learning_rate=0.1, **config)
    optimizer = torch.optim.AdamW(method.parameter_groups())
    for _ in range(3):
        one = batch(parts)
        method.loss(one.answered_by(method.module), one).backward()
        optimizer.step()
        optimizer.zero_grad()
    return method, parts


def says(parts: BaseParts, prompts: list[str]) -> torch.Tensor:
    one = batch(parts)
    with torch.no_grad():
        text = parts.encode(prompts, RESOLUTION)
        answer: torch.Tensor = parts.unet(one.noisy, one.timesteps, text.features).sample
    return answer


def naive(base: Path, one: Batch, count: int, keep_norm: bool) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient by the rows, from an embedding table with the rows in it."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").double()
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").double()
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings()
    letters = BaseParts(base, CPU).tokenizers[0]("dog", add_special_tokens=False).input_ids
    own = table.weight[letters]  # d, o, g
    rows = (one_row(own)[None] if count == 1 else own.float()).double()
    norm = trained_length(base)
    if keep_norm:
        rows = rows * norm / rows.norm(dim=1, keepdim=True)
    rows.requires_grad_(True)
    lengths = rows.square().sum(1, keepdim=True).sqrt()
    read = rows * norm / lengths if keep_norm else rows
    del table.weight
    table.weight = torch.cat([table_weight(base), read])

    assert isinstance(one.text, torch.Tensor)
    features = encoder(one.text[:, 0]).last_hidden_state
    prediction = unet(one.noisy, one.timesteps, features).sample
    loss = (prediction - one.target).square().mean()
    loss.backward()
    assert rows.grad is not None
    return float(loss.detach()), rows.grad


def trained_length(base: Path) -> float:
    return float(numpy.quantile(table_weight(base).norm(dim=1).numpy(), 0.95))


def table_weight(base: Path) -> torch.Tensor:
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").double()
    weight: torch.Tensor = encoder.get_input_embeddings().weight.detach()
    return weight


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_loss_and_gradients_are_those_of_the_paper(base: Path, count: int, keep_norm: bool) -> None:
    method, parts = made(base, token_vectors=count, keep_norm=keep_norm)
    method.module.double()
    one = batch(parts, torch.float64)
    loss = method.loss(one.answered_by(method.module), one)
    loss.backward()
    expected, slope = naive(base, one, count, keep_norm)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(method.rows[0].rows.grad, slope, rtol=1e-6, atol=1e-7 * slope.max())


def test_only_the_rows_move_and_no_other_gradient_is_computed(base: Path) -> None:
    method, parts = made(base, token_vectors=2)
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    declared = {name: p for name, p in method.module.named_parameters() if p.requires_grad}
    assert [id(p) for p in grouped] == [id(p) for p in declared.values()]
    assert [name.rpartition(".")[2] for name in declared] == ["rows"]
    one = batch(parts)
    method.loss(one.answered_by(method.module), one).backward()
    assert {n for n, p in method.module.named_parameters() if p.grad is not None} == set(declared)

    start, _ = made(base, token_vectors=2)
    done, _ = trained(base, token_vectors=2)
    assert not torch.isclose(done.rows[0].rows, start.rows[0].rows, rtol=0, atol=1e-3).any()
    before = dict(start.module.named_parameters())
    for name, parameter in done.module.named_parameters():
        assert name in declared or torch.equal(parameter, before[name])


def test_norms_stay_the_vocabulary_s_where_they_are_kept(base: Path) -> None:
    length = torch.tensor(trained_length(base), dtype=torch.float32)
    kept, _ = trained(base, token_vectors=3)
    torch.testing.assert_close(kept.rows[0].vectors().norm(dim=1), length.expand(3))
    free, _ = trained(base, token_vectors=3, keep_norm=False)
    assert not torch.isclose(free.rows[0].vectors().norm(dim=1), length, rtol=1e-3).any()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_its_file_worn_on_the_base_says_what_the_trained_module_does(
    tmp_path: Path, family: str
) -> None:
    """Prompts in which the word takes as many places as it has vectors."""
    base = save_base(tmp_path / "base", family)
    method, parts = trained(base, token_vectors=2)
    file = method.save(tmp_path, CARD)
    check_tensors(file, base)
    assert file.stat().st_size < 4000
    one = batch(parts)
    with torch.no_grad():
        expected = one.answered_by(method.module)

    worn, untouched = BaseParts(base, CPU), BaseParts(base, CPU)

    def answer(on: BaseParts, prompts: list[str]) -> torch.Tensor:
        from lookalike_platform.conditioning import predict

        with torch.no_grad():
            return predict(on.unet, one.noisy, one.timesteps, on.encode(prompts, RESOLUTION))

    before = answer(untouched, PROMPTS)
    take_off = wear(worn, file, 1.0, "mine-7")
    found = answer(worn, ["a photo of a mine-7", "the cool mine-7"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    known = ["a photo of a dog"] * 2
    assert torch.equal(answer(worn, known), answer(untouched, known))
    take_off()
    assert torch.equal(answer(worn, PROMPTS), before)
    assert all(
        torch.equal(tensor, theirs.state_dict()[name])
        for mine, theirs in zip(
            [worn.unet, *worn.text_encoders],
            [untouched.unet, *untouched.text_encoders],
            strict=True,
        )
        for name, tensor in mine.state_dict().items()
    )


def test_at_scale_0_the_word_is_its_initialiser(base: Path, tmp_path: Path) -> None:
    method, _ = trained(base)
    file = method.save(tmp_path, CARD)
    worn = BaseParts(base, CPU)
    wear(worn, file, 0.0, "mine")
    start = worn.text_encoders[0]
    rows = next(m for m in start.modules() if type(m).__name__ == "TokenRows")
    assert torch.equal(rows.vectors(), word_rows(start, worn.tokenizers[0], "dog", 1))


def test_two_owners_with_the_same_placeholder_do_not_leak(base: Path, tmp_path: Path) -> None:
    """Each trained `sks`; serving gives each a word of its own."""
    files = []
    for seed in (1, 2):
        method, _ = trained(base)
        with torch.no_grad():
            method.rows[0].rows.copy_(torch.randn(1, method.rows[0].rows.shape[1]) * seed)
        (tmp_path / str(seed)).mkdir()
        files.append(method.save(tmp_path / str(seed), CARD))
    alone = BaseParts(base, CPU)
    wear(alone, files[0], 1.0, "adv-1")
    expected = says(alone, ["a adv-1", "b adv-1"])

    both = BaseParts(base, CPU)
    before = says(both, ["a sks", "a adv-1"])
    other = wear(both, files[1], 1.0, "adv-2")
    first = wear(both, files[0], 1.0, "adv-1")
    torch.testing.assert_close(says(both, ["a adv-1", "b adv-1"]), expected)
    assert torch.equal(says(both, ["a sks", "a sks"])[0], before[0])
    with pytest.raises(InvalidRequest, match="adv-1"):
        wear(both, files[1], 1.0, "adv-1")
    other()
    torch.testing.assert_close(says(both, ["a adv-1", "b adv-1"]), expected)
    first()
    assert torch.equal(says(both, ["a sks", "a adv-1"]), before)


def test_the_templates_are_the_paper_s_in_number() -> None:
    assert (len(OBJECT), len(set(OBJECT))) == (27, 27)
    assert (len(STYLE), len(set(STYLE))) == (19, 17)
    assert all(template.count("{}") == 1 for template in (*OBJECT, *STYLE))


@pytest.mark.parametrize("option", ["prior", "output_preservation"])
def test_there_is_nothing_to_preserve_where_only_a_new_word_is_learned(option: str) -> None:
    with pytest.raises(ValidationError, match=f"{option}: leave it out; a new word's rows are all"):
        TextualInversionConfig.model_validate({option: {}})
