"""Two adapters on one base: for every pair the table allows, their changes are what it says."""

from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lookalike_platform.conditioning import Text, predict
from lookalike_registry.compose import rules
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods import composition
from lookalike_trainers.methods.custom_diffusion import projections
from lookalike_trainers.methods.find import acts_on_rows, rows_of
from lookalike_trainers.methods.row_edits import RowEdits, Slot
from support_merging import COMPOSITIONS, Maker, trained_or_merged
from support_methods import CPU
from support_models import RESOLUTION, save_base
from support_pairs import Adapter, answers, inputs_of, noisy, wearing

OF = {rules.COMPOSITION: COMPOSITIONS}
PAIRS = list(
    dict.fromkeys(
        pair
        for rule in rules.table()
        if rule.together
        for pair in product(OF.get(rule.one, [rule.one]), OF.get(rule.other, [rule.other]))
    )
)
WHOLE = {"dora", "dreambooth", "svdiff", "diff_fit", "gated_whole"}
BY_ROW = [pair for pair in PAIRS if not WHOLE.issuperset(pair)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return cache(partial(trained_or_merged, base, tmp_path_factory.mktemp("adapters")))


def changes_of_k_and_v(parts: BaseParts, worn: Adapter) -> dict[str, torch.Tensor]:
    """s D by layer, as it is in the base's weights."""
    layers = projections(parts.unet)
    own = {name: layer.weight.clone() for name, layer in layers.items()}
    with wearing(parts, worn):
        return {f"unet.{name}": layers[name].weight - own[name] for name in own}


def taken(worn: Adapter, e: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What Perfusion's gates (eq. 4 and 5) take away beyond W i where W has changed by `delta`."""
    method, file, scale, _ = worn
    gates = [(load_file(file), 1.0)] if method == "perfusion" else []
    if method == rules.COMPOSITION:
        gates = [(dict(one.gate), one.gate_scale) for one in composition.load(file).subjects]
    total = e.new_zeros(*e.shape[:-1], len(delta))
    for tensors, own in gates:
        if tensors:
            i, direction = tensors["perfusion.encoding"], tensors["perfusion.direction"]
            similarity = ((e @ direction) / (i @ direction))[..., None]
            total += scale * own * similarity * (delta @ i)
    return total


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map("-".join, PAIRS))
def test_the_changes_of_a_pair_add_up_in_every_layer(
    base: Path, adapter: Maker, one: str, other: str
) -> None:
    """Each gate's edit being of what all changed weights say."""
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
    expected = {name: alone[name] + also[name] - plain[name] for name in plain}
    for gated, changed in ((first, second), (second, first)):
        for name, delta in changes_of_k_and_v(parts, changed).items():
            e = inputs_of(parts.unet.get_submodule(name.removeprefix("unet.")))
            expected[name] -= taken(gated, e, delta)
    for name in plain.keys() - {"whole"}:
        torch.testing.assert_close(both[name], expected[name], rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(turned[name], both[name], rtol=1e-4, atol=2e-4)


def spoken(parts: BaseParts, text: Text) -> dict[str, torch.Tensor]:
    """What K and V say of a text, and the UNet (`whole`) to it."""
    said = {}

    def listen(name: str, _: object, __: object, y: torch.Tensor) -> None:
        said[name] = y.clone()

    handles = [
        layer.register_forward_hook(partial(listen, name))
        for name, layer in projections(parts.unet).items()
    ]
    said["whole"] = predict(parts.unet, *noisy(1), text)
    for handle in handles:
        handle.remove()
    return said


@torch.no_grad()
def by_rows(parts: BaseParts, *adapters: Adapter) -> dict[str, torch.Tensor]:
    """`spoken` where a row wears those that can act on rows, and the base the others."""
    edits = RowEdits(parts.unet)
    apart = [one for one in adapters if acts_on_rows(read_header(one[1]))]
    with wearing(parts, *(one for one in adapters if one not in apart)):
        worn = [(rows_of(method)(parts, file), scale) for method, file, scale, _ in apart]
        undo = [
            adapter.wear_text(parts, adapter.text, scale, word)
            for (adapter, scale), (_, _, _, word) in zip(worn, apart, strict=True)
        ]
        text = parts.encode(["a sks zwx"], RESOLUTION)
        for take_off in reversed(undo):
            take_off()
        outfit = tuple(worn)
        edits.put_on([Slot(outfit, 1, edits.answers(outfit, text.features))])
        said = spoken(parts, text)
        edits.put_on([])
    return said


@pytest.mark.parametrize(("one", "other"), BY_ROW, ids=map("-".join, BY_ROW))
def test_a_row_that_wears_a_pair_is_as_the_base_that_wears_it(
    base: Path, adapter: Maker, one: str, other: str
) -> None:
    parts = BaseParts(base, CPU)
    pair = []
    for kind, number, scale in ((one, 0, 0.7), (other, 1, 0.6)):
        method, file, _, word = adapter(kind, number)
        assert acts_on_rows(read_header(file)) == (kind not in WHOLE)
        pair.append((method, file, scale, word))
    with torch.no_grad():
        plain = spoken(parts, parts.encode(["a sks zwx"], RESOLUTION))
        with wearing(parts, *pair):
            expected = spoken(parts, parts.encode(["a sks zwx"], RESOLUTION))
    found = by_rows(parts, *pair)

    assert not torch.allclose(expected["whole"], plain["whole"], atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_the_table_refuses_would_depend_on_the_order(base: Path, adapter: Maker) -> None:
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
