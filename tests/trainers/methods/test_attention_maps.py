"""ED-LoRA's tokens are kept from looking beside the subject: against the formula in loops."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lookalike_trainers.data import Batch
from lookalike_trainers.method_configs import EdLoraConfig
from lookalike_trainers.methods.attention_maps import AttentionMaps, attention_outside
from lookalike_trainers.methods.ed_lora import cross_attention
from support_methods import SIDE, batch, loss_of, made, trained
from support_models import RESOLUTION, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def half_hidden(one: Batch) -> Batch:
    """The subject is on the left, in a column and a half more at the top."""
    samples, _, height, width = one.noisy.shape
    mask = torch.zeros(samples, 1, height, width, dtype=torch.float64)
    mask[..., : width // 2] = 1
    mask[..., : height // 4, width // 2] = 0.5
    return replace(one, mask=mask)


def cut(one: Batch, height: int, width: int) -> Batch:
    """The batch of pictures of another shape, that repeat from their edges."""
    rows, columns = torch.arange(height) % SIDE, torch.arange(width) % SIDE
    noisy, target = (t[..., rows, :][..., columns] for t in (one.noisy, one.target))
    return replace(one, noisy=noisy, target=target)


@pytest.mark.parametrize(
    ("height", "width"), [(SIDE, SIDE), (SIDE + 1, SIDE + 3)], ids=["halves evenly", "rounded up"]
)
def test_the_loss_counts_what_tokens_see_outside_the_mask(
    base: Path, height: int, width: int
) -> None:
    method, parts = trained(base, "ed_lora", masked_loss=True)
    method.module.double()
    one = half_hidden(cut(batch(method, parts, torch.float64), height, width))
    heard = listen(method.module.unet)
    with_penalty = loss_of(method, one)
    words = method.rows[0]
    penalty = naive_penalty(heard(), one, range(words.first, words.first + 2))

    plain = EdLoraConfig(**{**method.config.model_dump(), "attention_regularization": 0.0})
    method.config = plain
    without = loss_of(method, one)
    assert float(penalty.detach()) > 0.1
    torch.testing.assert_close(with_penalty - without, 0.01 * penalty, rtol=1e-10, atol=0)
    both = torch.autograd.grad(with_penalty, words.rows, retain_graph=True)[0]
    mine = both - torch.autograd.grad(without, words.rows)[0]
    naive = torch.autograd.grad(0.01 * penalty, words.rows)[0]
    torch.testing.assert_close(mine, naive, rtol=1e-8, atol=1e-10 * float(naive.abs().max()))


def listen(unet: Any) -> Callable[[], list[torch.Tensor]]:
    """Queries and keys that pass, made probabilities [n, heads, places, tokens] one by one."""
    said: dict[tuple[int, str], torch.Tensor] = {}
    layers = cross_attention(unet)
    for number, layer in enumerate(layers):
        for name in ("to_q", "to_k"):

            def note(_: Any, __: Any, out: torch.Tensor, at: Any = (number, name)) -> None:
                said.setdefault(at, out)

            getattr(layer, name).register_forward_hook(note)

    def heard() -> list[torch.Tensor]:
        found = []
        for number, layer in enumerate(layers):
            query, key = said[number, "to_q"], said[number, "to_k"]
            width = query.shape[-1] // layer.heads
            heads = [slice(h * width, (h + 1) * width) for h in range(layer.heads)]
            each = [query[..., h] @ key[..., h].mT / width**0.5 for h in heads]
            found.append(torch.stack([scores.softmax(-1) for scores in each], dim=1))
        return found

    return heard


def naive_penalty(found: list[torch.Tensor], one: Any, tokens: range) -> torch.Tensor:
    """Sample 0 has the word, sample 1 does not; sizes one by one, places one by one."""
    assert isinstance(one.text, torch.Tensor)
    height, width = one.mask.shape[2:]
    total = torch.zeros((), dtype=torch.float64)
    for places in {p.shape[2] for p in found}:
        heads = [head for p in found if p.shape[2] == places for head in p[0]]
        cell = next(c for c in (1, 2, 4, 8) if ceil(height / c) * ceil(width / c) == places)
        for token in tokens:
            at = one.text[0, 0].tolist().index(token)
            seen = torch.stack(heads).mean(0)[:, at]
            seen = seen / seen.max()
            above, below = torch.zeros(()).double(), 0.0
            for place in range(places):
                y, x = (cell * side for side in divmod(place, ceil(width / cell)))
                hidden = 1 - float(one.mask[0, 0, y : y + cell, x : x + cell].max())
                above, below = above + hidden * seen[place], below + hidden
            total = total + above / below
    return total


def test_a_photo_without_mask_or_without_the_word_is_not_penalised() -> None:
    maps = {SIDE * SIDE: torch.rand(2, SIDE * SIDE, 5)}
    ids = torch.tensor([[0, 7, 8, 1, 1], [0, 2, 3, 1, 1]])
    shown = torch.ones(2, 1, SIDE, SIDE)
    assert float(attention_outside(maps, ids, [7, 8], shown)) == 0
    assert float(attention_outside(maps, ids[1:].repeat(2, 1), [7, 8], shown * 0)) == 0
    assert float(attention_outside(maps, ids, [7, 8], shown * 0)) > 0
    with pytest.raises(ValueError, match="no level"):
        attention_outside({5: maps[SIDE * SIDE][:, :5]}, ids, [7, 8], shown)


def test_watched_attention_answers_as_before(base: Path) -> None:
    method, parts = made(base, "ed_lora")
    one = batch(method, parts)
    before = one.answered_by(method.module)
    maps = AttentionMaps(method.module.unet, cross_attention(method.module.unet))
    after = one.answered_by(method.module)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    for places, seen in maps.take().items():
        torch.testing.assert_close(seen.sum(-1), torch.ones(2, places))
    assert not maps.take()
    with torch.no_grad():
        one.answered_by(method.module)
    assert not maps.take()


def test_recomputed_activations_and_regularised_attention_are_refused_together() -> None:
    with pytest.raises(ValidationError, match="attention_regularization to 0"):
        EdLoraConfig(resolution=RESOLUTION, masked_loss=True, gradient_checkpointing=True)
