"""Each strategy is its pure function in every layer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lookalike_registry.compose.dare import dare_linear
from lookalike_registry.compose.fusion import RIDGE, Fusion
from lookalike_registry.compose.low_rank import LowRank, compress
from lookalike_registry.compose.routing import Router
from lookalike_registry.compose.ties import ties
from lookalike_registry.products import read_lora
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition import merging, words
from lookalike_trainers.composition.observing import observe
from lookalike_trainers.composition.parents import read
from lookalike_trainers.composition.request import ParentFile
from lookalike_trainers.methods.composition import load
from lookalike_trainers.methods.deltas import parameters_of
from support_merging import Maker, asked, merged, saved
from support_methods import CARD, CPU, trained
from support_models import RESOLUTION
from support_pairs import Adapter, wearing
from support_sampling import save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)  # diffusers' own


def pairs_of(adapters: list[Adapter]) -> list[dict[str, LowRank]]:
    """Products of LoRA files with scales multiplied in."""
    return [
        {name: LowRank(scale * p.up, p.down) for name, p in read_lora(file).items()}
        for _, file, scale, _ in adapters
    ]


def test_svd_keeps_the_best_of_the_sum_in_every_layer(base: Path, adapter: Maker) -> None:
    parents = [adapter("lora", 0), adapter("lora", 1)]
    one, other = pairs_of(parents)
    made = merged(asked(base, "svd", parents, rank=3)).products
    assert made.keys() == one.keys()
    for name, pair in made.items():
        total = one[name].dense() + other[name].dense()
        u, s, vt = torch.linalg.svd(total.double(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert len(pair.down) == 3
        torch.testing.assert_close(pair.dense().double(), best, rtol=1e-4, atol=1e-5)
    default = merged(asked(base, "svd", parents)).products
    assert {n: len(p.down) for n, p in default.items()} == {n: len(p.down) for n, p in one.items()}


@pytest.mark.parametrize("strategy", ["ties", "dare_linear"])
def test_ties_and_dare_are_theirs_in_every_layer_of_dense_changes(
    base: Path, adapter: Maker, strategy: str
) -> None:
    parents = [adapter("lora", 0), adapter("lora", 1)]
    one, other = pairs_of(parents)
    made = merged(asked(base, strategy, parents, density=0.3, seed=5)).products
    draws = torch.Generator().manual_seed(5)
    for name in sorted(one, key=lambda name: f"{name}.weight"):
        dense = [one[name].dense(), other[name].dense()]
        if strategy == "ties":
            expected = ties(dense, [1.0, 1.0], density=0.3)
        else:
            expected = dare_linear(dense, [1.0, 1.0], density=0.3, draws=draws)
        rank = len(one[name].down) + len(other[name].down)
        torch.testing.assert_close(made[name].dense(), compress(expected, rank=rank).dense())


def test_changes_without_a_rank_stay_dense_unless_one_is_asked_for(
    base: Path, adapter: Maker
) -> None:
    parents = [adapter("custom_diffusion", 0), adapter("lora", 1)]
    dense = merged(asked(base, "ties", parents))
    keys = {name.removesuffix(".weight") for name in dense.deltas}
    assert keys
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in keys)
    short = merged(asked(base, "ties", parents, rank=2))
    assert not short.deltas
    assert {len(short.products[name].down) for name in keys} == {2}


@pytest.mark.parametrize("strategy", ["svd", "ties", "dare_linear"])
def test_what_is_no_layer_stays_dense_whatever_rank_is_asked_for(
    base: Path, adapter: Maker, tmp_path: Path, strategy: str
) -> None:
    """DreamBooth with its text encoder changes norms, biases, and the tables of words and places:
    the merge is worn, and adds to each of them what the dense changes give."""
    method, _ = trained(base, "dreambooth", train_text_encoder=True)
    whole = ("dreambooth", method.save(tmp_path, CARD), 1.0, "zwx")
    request = asked(base, strategy, [adapter("lora", 0), whole], rank=2, density=1.0)
    made = merged(request)
    tables = {name for name in made.deltas if name.endswith("_embedding.weight")}
    assert {name.split(".")[-2] for name in tables} == {"token_embedding", "position_embedding"}
    assert made.products
    kept = tmp_path / "kept"
    kept.mkdir()
    parts = BaseParts(base, CPU)
    before = {name: w.clone() for name, w in parameters_of(parts).items() if name in made.deltas}
    change = read(request.parents[1], parts).deltas
    with wearing(parts, saved(request, kept)):
        for name, weight in before.items():
            found = parameters_of(parts)[name] - weight
            torch.testing.assert_close(found, change[name], rtol=1e-3, atol=1e-5)


class Heard:
    """Inputs for layers, drawn instead of observed: the same for the merge and the formula."""

    def __init__(self, base: Path) -> None:
        self.widths = {
            name.removesuffix(".weight"): weight.flatten(1).shape[1]
            for name, weight in parameters_of(BaseParts(base, CPU)).items()
            if weight.dim() > 1
        }

    def inputs(self, place: int, name: str) -> torch.Tensor:
        draws = torch.Generator().manual_seed(place * 1000 + sorted(self.widths).index(name))
        return torch.randn(2, 40, self.widths[name], generator=draws)

    def observe(self, place: int, layers: list[str], hear: Any) -> None:
        for name in layers:
            hear(name, self.inputs(place, name))


def test_ssr_and_fusion_are_theirs_in_every_layer(
    base: Path, adapter: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [adapter("lora", 0), adapter("lora", 1)]
    one, other = pairs_of(parents)
    heard = Heard(base)
    request = asked(base, "ssr", parents)
    monkeypatch.setattr(
        merging,
        "observe",
        lambda parts, parent, layers, hear, **how: heard.observe(
            [p.file for p in request.parents].index(parent.file), layers, hear
        ),
    )
    routed = merged(request).products
    fused = merged(asked(base, "fusion", parents)).products
    assert routed.keys() == fused.keys() == one.keys()
    for name in one:
        router = Router([one[name], other[name]])
        for place in (0, 1):
            router.observe(place, heard.inputs(place, name))
        torch.testing.assert_close(routed[name].dense(), router.merged().dense())

        seen = [heard.inputs(place, name).double().flatten(0, 1) for place in (0, 1)]
        grams = [rows.T @ rows for rows in seen]
        changes = [pair[name].dense().double().flatten(1) for pair in (one, other)]
        whole = sum(grams)
        ridge = RIDGE * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
        wanted = sum(change @ (own + ridge) for change, own in zip(changes, grams, strict=True))
        expected = wanted @ torch.linalg.inv(whole + ridge)
        found = fused[name].dense().double().flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


PLACES = [
    *((strategy, "lora") for strategy in ("ssr", "fusion", "svd", "ties", "dare_linear")),
    ("closed_form", "custom_diffusion"),
]


@pytest.mark.parametrize(("strategy", "kind"), PLACES, ids=map("-".join, PLACES))
def test_words_alone_change_nothing_that_the_others_merge(
    base: Path, adapter: Maker, strategy: str, kind: str
) -> None:
    pair, word = [adapter(kind, 0), adapter(kind, 1)], adapter("textual_inversion", 0)
    without = merged(asked(base, strategy, pair))
    beside = merged(asked(base, strategy, [pair[0], word, pair[1]]))
    assert [bool(one.rows) for one in beside.subjects].count(True) == 1 + sum(
        bool(one.rows) for one in without.subjects
    )
    assert beside.products.keys() == without.products.keys()
    for name, product in beside.products.items():
        torch.testing.assert_close(product.dense(), without.products[name].dense())
    assert beside.deltas.keys() == without.deltas.keys()
    for name, delta in beside.deltas.items():
        torch.testing.assert_close(delta, without.deltas[name])


def test_no_layer_of_a_merge_has_more_rank_than_its_sides(base: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        save_adapter(file, base, number, rank=64)
    parents = [("lora", file, 0.7, name) for file, name in zip(files, ("a", "b"), strict=True)]
    whole = merged(asked(base, "weighted_sum", parents)).products
    one, other = pairs_of(parents)
    for name, pair in whole.items():
        assert len(pair.down) <= min(one[name].dense().flatten(1).shape)
        expected = one[name].dense() + other[name].dense()
        torch.testing.assert_close(pair.dense(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ssr", "fusion"])
def test_a_parent_at_scale_0_leaves_the_other_as_it_is(
    base: Path, adapter: Maker, strategy: str
) -> None:
    silent = [(*made[:2], 0.0, made[3]) for made in (adapter("lora", 0), adapter("lora", 1))]
    (one,) = pairs_of([adapter("lora", 0)])
    found = merged(asked(base, strategy, [adapter("lora", 0), silent[1]])).products
    assert found.keys() == one.keys()
    for name, pair in found.items():
        torch.testing.assert_close(pair.dense(), one[name].dense(), rtol=1e-3, atol=1e-5)
    nothing = merged(asked(base, strategy, silent))
    assert not any(pair.dense().any() for pair in nothing.products.values())
    assert len(nothing.subjects) == 2


@pytest.mark.parametrize("strategy", ["ssr", "fusion"])
def test_what_a_parent_hears_is_answered_as_by_it_alone(
    base: Path, adapter: Maker, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Where each hears one thing of its own, nothing of the other is in the answer to it."""
    parents = [adapter("lora", 0), adapter("lora", 1)]
    own, heard = pairs_of(parents), Heard(base)
    request = asked(base, strategy, parents)

    def one_thing(parts: BaseParts, parent: ParentFile, layers: Any, hear: Any, **_: Any) -> None:
        place = request.parents.index(parent)
        for name in layers:
            hear(name, heard.inputs(place, name)[:1, :1])

    monkeypatch.setattr(merging, "observe", one_thing)
    for merger in (Router, Fusion):  # the least-squares problems as they stand
        monkeypatch.setattr(merging, merger.__name__, partial(merger, ridge=1e-6))
    made = merged(request).products
    for name, pair in made.items():
        for place in (0, 1):
            x = heard.inputs(place, name)[0, 0]
            alone, other = (own[one][name].dense().flatten(1) @ x for one in (place, 1 - place))
            assert other.norm() > 1e-3 * alone.norm()
            found = pair.dense().flatten(1) @ x
            torch.testing.assert_close(found, alone, rtol=1e-2, atol=1e-3 * float(alone.norm()))


@pytest.mark.parametrize("strategy", ["ssr", "fusion"])
def test_on_what_is_really_heard_a_merge_is_closer_to_each_parent_than_the_sum(
    base: Path, adapter: Maker, strategy: str
) -> None:
    parents = [adapter("lora", 0), adapter("lora", 1)]
    own, request = pairs_of(parents), asked(base, strategy, parents)
    made = merged(request).products
    for place, parent in enumerate(request.parents):
        off: dict[str, float] = {"merged": 0.0, "sum": 0.0}

        def hear(name: str, x: torch.Tensor, place: int = place, off: Any = off) -> None:
            alone = own[place][name].dense().flatten(1)
            both = alone + own[1 - place][name].dense().flatten(1)
            for kind, change in (("merged", made[name].dense().flatten(1)), ("sum", both)):
                off[kind] += float((x @ (change - alone).T).square().sum())

        observe(BaseParts(base, CPU), parent, list(made), hear, resolution=RESOLUTION, seed=0)
        assert off["merged"] < 0.9 * off["sum"], (place, off)


def test_a_parent_without_a_layer_gets_nothing_from_the_other_there(
    base: Path, adapter: Maker, tmp_path: Path
) -> None:
    """ED-LoRA also changes the text encoder; SSR keeps it from answering the LoRA's subject."""
    both = [adapter("lora", 0), adapter("ed_lora", 1)]
    made = merged(asked(base, "ssr", both)).products
    text = [name for name in made if name.startswith("text_encoder.")]
    assert text
    assert not any(name.startswith("text_encoder.") for name in read_lora(both[0][1]))
    assert all(pair.dense().isfinite().all() for pair in made.values())


@pytest.mark.parametrize("second", [0, 1], ids=["the same twice", "two"])
def test_the_closed_form_keeps_what_each_concepts_words_say(
    base: Path, adapter: Maker, tmp_path: Path, second: int
) -> None:
    """W c* = V* = W_i c* in every K and V, of the merged file worn on the base."""
    method, file, scale, _ = adapter("custom_diffusion", second)
    parents = [adapter("custom_diffusion", 0), (method, file, scale, "zwx")]
    request = asked(base, "closed_form", parents)
    whole = saved(request, tmp_path)
    parts = BaseParts(base, CPU)
    spoken = [words.features(parts, parent, RESOLUTION) for parent in request.parents]
    layers = list(load(whole[1]).deltas)
    assert layers
    own = {}
    for place, one in enumerate(parents):
        with wearing(parts, one):
            weights = parameters_of(parts)
            own[place] = {name: spoken[place] @ weights[name].T.clone() for name in layers}
    with wearing(parts, whole):
        weights = parameters_of(parts)
        for place in (0, 1):
            for name in layers:
                kept = spoken[place] @ weights[name].T
                torch.testing.assert_close(kept, own[place][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", ["ssr", "fusion", "ties"])
def test_one_adapter_under_two_names_does_not_blow_up(
    base: Path, adapter: Maker, strategy: str
) -> None:
    """Collinear signals and equal inputs: the sum's size at most, and nothing infinite."""
    method, file, _, _ = adapter("lora", 0)
    twice = [(method, file, 1.0, "sks"), (method, file, 1.0, "zwx")]
    once = pairs_of(twice[:1])[0]
    for name, pair in merged(asked(base, strategy, twice)).products.items():
        assert pair.dense().isfinite().all()
        assert float(pair.dense().norm()) <= 2.01 * float(once[name].dense().norm())
