"""Learned words: their rows, their length, and that they come off without a trace."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.tokens import (
    TokenRows,
    embeddings,
    learn_rows,
    wear_words,
    word_norm,
    word_rows,
)
from support_models import RESOLUTION, WIDTH, save_base

CPU = torch.device("cpu")
PROMPTS = ["a sks dog", "a plain dog", "zot and sks"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    drawn = torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed))
    return {"tokens.text_encoder": drawn}


def features(parts: BaseParts) -> torch.Tensor:
    with torch.no_grad():
        return parts.encode(PROMPTS, RESOLUTION).features


def test_known_ids_read_the_table_and_learned_ids_the_rows() -> None:
    table, own = nn.Embedding(5, 3), torch.randn(2, 3)
    both = torch.cat([table.weight.detach(), own])
    ids = torch.tensor([[0, 5, 4], [6, 5, 1]])
    assert torch.equal(TokenRows(table, own, 5)(ids), both[ids])


def test_rows_held_at_a_norm_have_it_and_the_gradient_of_the_formula() -> None:
    """v = n r / |r|:  dL/dr = n / |r| (g - u (u . g)), with u = r / |r| and g = dL/dv."""
    table = nn.Embedding(5, 3).double()
    layer = TokenRows(table, torch.randn(2, 3), 5, norm=0.4).double()
    with torch.no_grad():
        layer.rows.mul_(torch.tensor([[3.0], [0.5]]))
    slope = torch.randn(1, 2, 3, dtype=torch.float64)
    out = layer(torch.tensor([[5, 6]]))
    out.backward(slope)
    length = layer.rows.detach().norm(dim=-1, keepdim=True)
    unit = layer.rows.detach() / length
    torch.testing.assert_close(out[0], 0.4 * unit, rtol=1e-12, atol=0)
    expected = 0.4 / length * (slope[0] - unit * (unit * slope[0]).sum(-1, keepdim=True))
    assert layer.rows.grad is not None
    torch.testing.assert_close(layer.rows.grad, expected, rtol=1e-10, atol=0)


def test_the_words_length_is_that_of_rows_that_were_trained(base: Path) -> None:
    """Nine rows in ten stay as short as they were drawn, and the longest is no measure."""
    (encoder,) = BaseParts(base, CPU).text_encoders
    table = embeddings(encoder).token_embedding.weight
    trained = torch.arange(len(table)) % 10 == 0
    with torch.no_grad():
        table.copy_(nn.functional.normalize(table, dim=1) * torch.where(trained, 0.9, 0.3)[:, None])
        table[0] *= 100
    assert word_norm(encoder) == pytest.approx(0.9)


def test_rows_are_held_at_the_length_of_the_vocabulary_s_words(base: Path) -> None:
    parts = BaseParts(base, CPU)
    parts.learn("sks", 2)
    (encoder,) = parts.text_encoders
    held = torch.full((2,), word_norm(encoder))
    (layer,) = learn_rows(parts, [encoder], "sks", "q", keep_norm=True)
    torch.testing.assert_close(layer.vectors().norm(dim=1), held)


@pytest.mark.parametrize(
    ("count", "shares"),
    [(1, ["wxyz"]), (2, ["wx", "yz"]), (3, ["w", "x", "yz"]), (4, [*"wxyz"]), (6, [*"wwxyyz"])],
)
def test_rows_start_from_the_initialiser_s_tokens_in_order(
    base: Path, count: int, shares: list[str]
) -> None:
    """Each from its share of them: their mean's direction, as long as they are on average."""
    parts = BaseParts(base, CPU)
    (encoder,), (tokenizer,) = parts.text_encoders, parts.tokenizers
    ids = dict(zip("wxyz", tokenizer("wxyz", add_special_tokens=False).input_ids, strict=True))
    table = embeddings(encoder).token_embedding.weight.detach().numpy()
    expected = []
    for share in shares:
        tokens = numpy.stack([table[ids[letter]] for letter in share])
        mean = tokens.mean(0)
        lengths = [numpy.sqrt((token**2).sum()) for token in tokens]
        expected.append(mean / numpy.sqrt((mean**2).sum()) * numpy.mean(lengths))
    found = word_rows(encoder, tokenizer, "wxyz", count)
    numpy.testing.assert_allclose(found.numpy(), numpy.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("word", ["", "  "])
def test_rows_do_not_start_from_a_word_without_tokens(base: Path, word: str) -> None:
    parts = BaseParts(base, CPU)
    with pytest.raises(InvalidRequest, match=r"no tokens of .* name another word as initializer"):
        word_rows(parts.text_encoders[0], parts.tokenizers[0], word, 2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_words_come_off_in_any_order_and_leave_the_base_to_the_bit(
    base: Path, order: tuple[int, int]
) -> None:
    parts, plain = BaseParts(base, CPU), BaseParts(base, CPU)
    before = features(plain)
    offs = [wear_words(parts, rows(2), "sks"), wear_words(parts, rows(3, 1), "zot")]
    both = features(parts)
    assert torch.equal(both[1], before[1])
    assert not torch.equal(both[0], before[0])
    offs[order[0]]()
    one = features(parts)
    only = BaseParts(base, CPU)
    wear_words(only, *[(rows(3, 1), "zot"), (rows(2), "sks")][order[0]])
    torch.testing.assert_close(one, features(only))
    offs[order[1]]()
    assert torch.equal(features(parts), before)
    assert not parts.learned
    assert parts.text_encoders[0].state_dict().keys() == plain.text_encoders[0].state_dict().keys()


def test_two_adapters_cannot_answer_to_one_word(base: Path) -> None:
    parts = BaseParts(base, CPU)
    wear_words(parts, rows(1), "sks")
    with pytest.raises(InvalidRequest, match="sks"):
        wear_words(parts, rows(1, 1), "sks")


def test_two_owners_words_do_not_leak_into_each_other(base: Path) -> None:
    """Each has its own word, however alike they are spelled."""
    alone = BaseParts(base, CPU)
    wear_words(alone, rows(1), "mine")
    with torch.no_grad():
        expected = alone.encode(["a mine"], RESOLUTION).features
        parts = BaseParts(base, CPU)
        wear_words(parts, rows(1, 1), "mine_2")
        wear_words(parts, rows(1), "mine")
        found = parts.encode(["a mine"], RESOLUTION).features
    torch.testing.assert_close(found, expected)
