"""The table of what combines with what."""

from pathlib import Path

import pytest

from lookalike_registry.compose import rules
from lookalike_registry.manifest import Manifest
from lookalike_trainers.catalog import METHODS
from support_registry import finished_run, manifest_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "composition.md"


def test_every_method_has_its_rules() -> None:
    assert {method.name for method in METHODS} == {*rules.KINDS} - {"dora", rules.COMPOSITION}


def test_a_pair_is_told_how_it_combines_or_why_not() -> None:
    count = len(rules.KINDS)
    assert len(rules.table()) == count * (count + 1) // 2
    for pair in rules.table():
        assert (pair.together is None) == (pair.refused is not None)
        assert (not pair.merges) == (pair.unmerged is not None)


def test_the_order_of_a_pair_does_not_matter() -> None:
    for pair in rules.table():
        turned = rules.combination(pair.other, pair.one)
        assert (turned.together, turned.merges) == (pair.together, pair.merges)


@pytest.mark.parametrize(
    ("kinds", "default"),
    [
        (["lora", "lora", "lora"], "ssr"),
        (["ed_lora", "ed_lora"], "ssr"),
        (["custom_diffusion", "custom_diffusion"], "closed_form"),
        (["custom_diffusion", "lora"], "weighted_sum"),
        (["textual_inversion", "dreambooth"], "weighted_sum"),
        (["textual_inversion", "textual_inversion"], "weighted_sum"),
        (["lora", "textual_inversion", "ed_lora"], "ssr"),
        (["textual_inversion", "custom_diffusion"], "closed_form"),
        (["perfusion", "perfusion"], "weighted_sum"),
    ],
)
def test_the_first_strategy_is_made_for_its_parents(kinds: list[str], default: str) -> None:
    assert rules.strategies_for(kinds)[0] == default


def test_nothing_merges_with_a_t_lora_though_everything_acts_with_it() -> None:
    for kind in rules.KINDS:
        pair = rules.combination("t_lora", kind)
        assert pair.together
        assert pair.unmerged
        assert not pair.merges


def test_of_many_adapters_each_pair_that_cannot_act_is_named() -> None:
    places = [(one, other) for one, other, _ in rules.refusals(["lora", "dora", "svdiff", "dora"])]
    assert places == [(1, 2), (2, 3)]
    assert rules.refusals(["lora", "t_lora", "ed_lora", "perfusion", "dreambooth"]) == []


def test_a_lora_with_learned_lengths_is_of_another_kind(tmp_path: Path) -> None:
    plain = manifest_of(finished_run(tmp_path), "job_1")
    assert rules.kind_of(plain) == "lora"
    weights = plain.weights.model_copy(update={"dora": True})
    assert rules.kind_of(plain.model_copy(update={"weights": weights})) == "dora"


def test_a_record_from_before_compositions_is_still_read(tmp_path: Path) -> None:
    plain = manifest_of(finished_run(tmp_path), "job_1").model_dump()
    del plain["weights"]["dora"], plain["prompting"]["subjects"], plain["lineage"]["parents"]
    assert Manifest.model_validate(plain).names == {"teapot"}


def test_the_document_shows_this_table() -> None:
    text = DOCUMENT.read_text()
    for pair in rules.table():
        merges = ", ".join(f"`{name}`" for name in pair.merges) or "–"
        row = f"| {pair.one} | {pair.other} | {'yes' if pair.together else 'no'} | {merges} |"
        assert row in text
    for one in rules.STRATEGIES:
        assert f"| `{one.name}` | {one.summary} |" in text
    said = {r for p in rules.table() for r in (p.together, p.refused, p.unmerged) if r}
    for one in said:
        assert f"\n- {one}.\n" in text
