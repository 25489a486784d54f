"""Two adapters on one base: for every pair the table allows, their changes are what it says."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lookalike_registry.compose import rules
from lookalike_trainers.base_parts import BaseParts
from support_methods import CPU
from support_models import save_base
from support_pairs import Adapter, answers, inputs_of, trained_adapter, wearing

PAIRS = [
    (pair.one, pair.other)
    for pair in rules.table()
    if pair.together and rules.COMPOSITION not in (pair.one, pair.other)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Adapter]:
    return cache(partial(trained_adapter, base, tmp_path_factory.mktemp("adapters")))


def edited(parts: BaseParts, name: str, before: torch.Tensor, worn: Adapter) -> torch.Tensor:
    """Perfusion's edit (eq. 4 and 5) of what a layer says now, W e, written out."""
    _, file, scale, _ = worn
    tensors = load_file(file)
    layer = parts.unet.get_submodule(name.removeprefix("unet."))
    e, i, direction = (
        inputs_of(layer),
        tensors["perfusion.encoding"],
        tensors["perfusion.direction"],
    )
    similarity = ((e @ direction) / (i @ direction))[..., None]
    gate = 1 / (1 + torch.exp(-(similarity - 0.70) / 0.15))
    answer = tensors[f"perfusion.{name}"]
    return before + scale * (gate * answer - similarity * (layer.weight @ i))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map("-".join, PAIRS))
def test_the_changes_of_a_pair_add_up_in_every_layer(
    base: Path, adapter: Callable[[str, int], Adapter], one: str, other: str
) -> None:
    parts = BaseParts(base, CPU)
    first, second = adapter(one, 0), adapter(other, 1)
    plain = answers(parts)
    with wearing(parts, first):
        alone = answers(parts)
    with wearing(parts, second):
        also = answers(parts)
    with wearing(parts, first, second):
        both = answers(parts)
    with wearing(parts, second, first):
        turned = answers(parts)

    assert not torch.allclose(both["whole"], alone["whole"], atol=1e-4)
    assert not torch.allclose(both["whole"], also["whole"], atol=1e-4)
    gated = "perfusion" in (one, other) and {one, other} & rules.WEIGHTS
    for name in plain.keys() - {"whole"}:
        expected = alone[name] + also[name] - plain[name]
        if gated and name.endswith(("attn2.to_k", "attn2.to_v")):
            gate, weights = (first, second) if one == "perfusion" else (second, first)
            with wearing(parts, weights):
                before = (also if weights is second else alone)[name]
                expected = edited(parts, name, before, gate)
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(turned[name], both[name], rtol=1e-4, atol=2e-4)


def test_what_the_table_refuses_would_depend_on_the_order(
    base: Path, adapter: Callable[[str, int], Adapter]
) -> None:
    parts = BaseParts(base, CPU)
    for kind in rules.WEIGHTS:
        first, second = adapter("dora", 0), adapter(kind, 1)
        plain = answers(parts)
        with wearing(parts, first):
            alone = answers(parts)
        with wearing(parts, second):
            also = answers(parts)
        with wearing(parts, first, second):
            both = answers(parts)
        worst = max(
            float((both[name] - alone[name] - also[name] + plain[name]).abs().max())
            for name in plain.keys() - {"whole"}
        )
        assert worst > 1e-3, kind
