"""Each strategy is its pure function in every layer, and files hold what comes out."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.check import check_file
from lookalike_registry.compose import rules
from lookalike_registry.compose.dare import dare_linear
from lookalike_registry.compose.fusion import RIDGE
from lookalike_registry.compose.low_rank import LowRank, compress
from lookalike_registry.compose.routing import Router
from lookalike_registry.compose.ties import ties
from lookalike_registry.manifest import SubjectRecord
from lookalike_registry.products import read_lora
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition import merging, words
from lookalike_trainers.composition.merging import merge
from lookalike_trainers.composition.observing import observe
from lookalike_trainers.composition.parents import read
from lookalike_trainers.composition.request import (
    CompositionRequest,
    MergeOptions,
    ParentFile,
)
from lookalike_trainers.methods.composition import Change, load, save
from lookalike_trainers.methods.deltas import parameters_of
from support_formats import diffusers_paints, pipeline, same, we_paint
from support_methods import CARD, CPU, trained
from support_models import RESOLUTION, save_base
from support_pairs import Adapter, answers, trained_adapter, wearing

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)  # diffusers' own

NOT_MERGED = {"t_lora", rules.COMPOSITION}
KINDS = [*(kind for kind in rules.KINDS if kind not in NOT_MERGED), "pivotal"]
PAIRS = [(one, other) for place, one in enumerate(KINDS) for other in KINDS[place:]]
Maker = Callable[[str, int], Adapter]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return cache(partial(trained_adapter, base, tmp_path_factory.mktemp("adapters")))


def asked(base: Path, strategy: str, adapters: list[Adapter], **options: Any) -> CompositionRequest:
    parents = []
    for method, file, scale, word in adapters:
        learned = method != "dreambooth" and file.name != WEIGHTS_NAME
        subject = SubjectRecord(
            name=word, trigger=word, class_noun="dog", phrase="{trigger}", learned=learned
        )
        parents.append(ParentFile(method=method, file=file, scale=scale, subjects=[subject]))
    return CompositionRequest(
        name="duo",
        strategy=strategy,
        options=MergeOptions(**options),
        parents=parents,
        base_folder=base,
        family="sd1",
        prediction_type="epsilon",
        resolution=RESOLUTION,
        cache=base,
        device="cpu",
    )


def merged(request: CompositionRequest) -> Change:
    return merge(request, BaseParts(request.base_folder, CPU), lambda done, total: None)


def saved(request: CompositionRequest, folder: Path) -> Adapter:
    """The merged file, at scale 1, whose subjects answer to kim and kim-2."""
    file = save(merged(request), folder, CARD)
    check_file(file, request.base_folder)
    if file.name == WEIGHTS_NAME:
        return ("lora", file, 1.0, "kim")
    return (rules.COMPOSITION, file, 1.0, "kim")


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map("-".join, PAIRS))
def test_a_weighted_sum_does_what_both_parents_do_together(
    base: Path, adapter: Maker, tmp_path: Path, one: str, other: str
) -> None:
    adapters = [adapter(one, 0), adapter(other, 1)]
    whole = saved(asked(base, "weighted_sum", adapters), tmp_path)
    words_are = ("kim", "kim-2") if whole[0] == rules.COMPOSITION else ("sks", "zwx")
    prompt = f"a {' '.join(words_are)}"
    parts = BaseParts(base, CPU)
    plain = answers(parts)
    with wearing(parts, whole):
        together = answers(parts, prompt)
    assert not parts.learned
    torch.testing.assert_close(answers(parts), plain, rtol=0, atol=0)
    kinds = [{"pivotal": "lora"}.get(kind, kind) for kind in (one, other)]
    as_one = rules.combination(*kinds).refused  # then a DoRA acts only as its change of the base
    both = [
        (*(fixed(base, made, tmp_path) if as_one and kind == "dora" else made)[:3], word)
        for kind, made, word in zip((one, other), adapters, words_are, strict=True)
    ]
    with wearing(parts, *both):
        expected = answers(parts, prompt)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=2e-4)


def test_a_dora_worn_with_a_gate_would_differ_from_their_merge(
    base: Path, adapter: Maker, tmp_path: Path
) -> None:
    """Which is why the table refuses the two in one generation."""
    assert rules.combination("dora", "perfusion").refused
    pair = [adapter("dora", 0), adapter("perfusion", 1)]
    parts = BaseParts(base, CPU)
    with wearing(parts, saved(asked(base, "weighted_sum", pair), tmp_path)):
        together = answers(parts, "a kim-2")
    with wearing(parts, pair[0], (*pair[1][:3], "kim-2")):
        worn = answers(parts, "a kim-2")
    differing = {n for n in worn if float((worn[n] - together[n]).abs().max()) > 1e-3} - {"whole"}
    assert differing
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in differing)


def fixed(base: Path, adapter: Adapter, folder: Path) -> Adapter:
    """A DoRA as the fixed change of the base that merges take it for."""
    request = asked(base, "weighted_sum", [adapter, adapter])
    own = folder / adapter[3]
    own.mkdir()
    change = read(request.parents[0], BaseParts(base, CPU))
    return (rules.COMPOSITION, save(change, own, CARD), 1.0, adapter[3])


@pytest.mark.parametrize("number", [0, 1], ids=["whole", "at a scale"])
def test_a_dora_is_merged_as_what_it_does_to_the_base(
    base: Path, adapter: Maker, tmp_path: Path, number: int
) -> None:
    parts, dora = BaseParts(base, CPU), adapter("dora", number)
    with wearing(parts, dora):
        worn = answers(parts)
    with wearing(parts, fixed(base, dora, tmp_path)):
        as_delta = answers(parts)
    torch.testing.assert_close(as_delta, worn, rtol=1e-4, atol=2e-4)


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
        wanted = sum(change @ own for change, own in zip(changes, grams, strict=True))
        expected = wanted @ torch.linalg.inv(whole + ridge)
        found = fused[name].dense().double().flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


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


@pytest.mark.parametrize("strategy", ["weighted_sum", "ssr", "svd"])
def test_loras_become_a_lora_that_plain_diffusers_paints_alike(
    base: Path, adapter: Maker, tmp_path: Path, strategy: str
) -> None:
    method, file, _, _ = saved(
        asked(base, strategy, [adapter("lora", 0), adapter("lora", 1)]), tmp_path
    )
    assert (method, file.name) == ("lora", WEIGHTS_NAME)
    pipe = pipeline(base)
    bare = diffusers_paints(pipe, "a sks dog")
    pipe.load_lora_weights(file)
    painted = diffusers_paints(pipe, "a sks dog")
    assert not same(painted, bare)
    assert same(painted, we_paint(base, "a sks dog", "lora", file))


def test_a_merged_version_merges_again(base: Path, adapter: Maker, tmp_path: Path) -> None:
    first = saved(
        asked(base, "weighted_sum", [adapter("perfusion", 0), adapter("custom_diffusion", 1)]),
        tmp_path,
    )
    again = merged(asked(base, "weighted_sum", [first, adapter("textual_inversion", 0)]))
    assert [bool(subject.rows) for subject in again.subjects] == [True, True, True]
    assert [bool(subject.gate) for subject in again.subjects] == [True, False, False]
    assert again.deltas.keys() == load(first[1]).deltas.keys()
