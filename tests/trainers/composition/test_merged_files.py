"""The file of a merge does what its parents do together, wherever it is worn."""

from pathlib import Path

import pytest
import torch

from lookalike_platform.conditioning import Text, predict
from lookalike_platform.errors import CapabilityMissing
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.compose import rules
from lookalike_registry.formats.export import FORMATS, export
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.parents import read
from lookalike_trainers.methods.composition import load, rows, save
from lookalike_trainers.methods.find import acts_on_rows
from lookalike_trainers.methods.row_edits import RowEdits, Slot
from support_formats import diffusers_paints, pipeline, same, we_paint
from support_merging import Maker, asked, merged, saved
from support_methods import CARD, CPU
from support_models import RESOLUTION
from support_pairs import Adapter, answers, noisy, wearing
from support_sampling import LIBRARY_WARNINGS, save_adapter

pytestmark = LIBRARY_WARNINGS

NOT_MERGED = {"t_lora", rules.COMPOSITION}
KINDS = [*(kind for kind in rules.KINDS if kind not in NOT_MERGED), "pivotal"]
PAIRS = [(one, other) for place, one in enumerate(KINDS) for other in KINDS[place:]]


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


BY_ROW = [
    ("closed_form", "custom_diffusion", "custom_diffusion"),
    ("weighted_sum", "pivotal", "custom_diffusion"),
    ("weighted_sum", "ed_lora", "textual_inversion"),
    ("weighted_sum", "perfusion", "lora"),
    ("weighted_sum", "perfusion", "custom_diffusion"),
    ("weighted_sum", "perfusion", "perfusion"),
    ("ssr", "lora", "ed_lora"),
]
WHOLE = [("weighted_sum", "perfusion", "dreambooth"), ("weighted_sum", "dreambooth", "lora")]


@pytest.mark.parametrize(("strategy", "one", "other"), BY_ROW, ids=map("-".join, BY_ROW))
def test_a_merge_of_words_products_gates_and_k_and_v_shares_a_batch_with_others(
    base: Path, adapter: Maker, tmp_path: Path, strategy: str, one: str, other: str
) -> None:
    method, file, _, word = saved(
        asked(base, strategy, [adapter(one, 0), adapter(other, 1)]), tmp_path
    )
    assert method == rules.COMPOSITION
    assert acts_on_rows(read_header(file))
    parts, scale, prompt = BaseParts(base, CPU), 0.7, f"a {word} and a {word}-2"
    with torch.inference_mode():
        plain = answers(parts, prompt)["whole"]
        with wearing(parts, (method, file, scale, word)):
            expected = answers(parts, prompt)["whole"]
        edits = RowEdits(parts.unet)
        worn = rows(parts, file)
        assert worn is not None
        take_off = worn.wear_text(parts, worn.text, scale, word)
        mine = parts.encode([prompt], RESOLUTION).features
        take_off()
        bare = parts.encode([prompt], RESOLUTION).features
        if mine.dim() == 4:
            bare = bare[:, None].expand_as(mine)
        edits.put_on(
            [
                Slot(((worn, scale),), 1, edits.answers(((worn, scale),), mine)),
                Slot((), 1, edits.answers((), bare)),
            ]
        )
        found = predict(parts.unet, *noisy(2), Text(torch.cat([mine, bare])))
        edits.put_on([])
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:], plain, rtol=1e-4, atol=1e-4)
    assert float((expected - plain).abs().max()) > 1e-2


@pytest.mark.parametrize(("strategy", "one", "other"), WHOLE, ids=map("-".join, WHOLE))
def test_a_merge_that_changes_more_is_worn_by_the_base_as_a_whole(
    base: Path, adapter: Maker, tmp_path: Path, strategy: str, one: str, other: str
) -> None:
    _, file, _, _ = saved(asked(base, strategy, [adapter(one, 0), adapter(other, 1)]), tmp_path)
    assert not acts_on_rows(read_header(file))


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


@pytest.mark.parametrize("strategy", [s.name for s in rules.STRATEGIES if "lora" in s.takes])
def test_loras_of_unlike_layers_and_ranks_are_merged_for_plain_diffusers_too(
    base: Path, tmp_path: Path, strategy: str
) -> None:
    files = [tmp_path / name / WEIGHTS_NAME for name in ("one", "other")]
    for file in files:
        file.parent.mkdir()
    save_adapter(files[0], base, 1, rank=1, targets=("to_q", "ff.net.2"))
    save_adapter(files[1], base, 2, rank=6, targets=("to_k", "to_q", "conv1"), text_encoder=True)
    parents = [("lora", files[0], 0.7, "sks"), ("lora", files[1], -0.5, "zwx")]
    method, merged_file, _, _ = saved(asked(base, strategy, parents), tmp_path)
    assert method == "lora"
    pipe = pipeline(base)
    pipe.load_lora_weights(merged_file)
    painted = diffusers_paints(pipe, "a sks dog")
    assert same(painted, we_paint(base, "a sks dog", "lora", merged_file))
    pipe.unload_lora_weights()
    assert not same(painted, diffusers_paints(pipe, "a sks dog"))
    if strategy == "weighted_sum":
        for name, file in zip("ab", files, strict=True):
            pipe.load_lora_weights(file, adapter_name=name)
        pipe.set_adapters(["a", "b"], [0.7, -0.5])
        assert same(painted, diffusers_paints(pipe, "a sks dog"))


def test_a_merged_version_merges_again(base: Path, adapter: Maker, tmp_path: Path) -> None:
    first = saved(
        asked(base, "weighted_sum", [adapter("perfusion", 0), adapter("custom_diffusion", 1)]),
        tmp_path,
    )
    again = merged(asked(base, "weighted_sum", [first, adapter("textual_inversion", 0)]))
    assert [bool(subject.rows) for subject in again.subjects] == [True, True, True]
    assert [bool(subject.gate) for subject in again.subjects] == [True, False, False]
    assert again.deltas.keys() == load(first[1]).deltas.keys()


def test_words_keep_their_places_behind_a_merged_lora_of_several_subjects(
    base: Path, adapter: Maker, tmp_path: Path
) -> None:
    """The record of a merge of LoRAs has two subjects, though its file has no words."""
    loras = [adapter("lora", 0), adapter("lora", 1)]
    pack = saved(asked(base, "weighted_sum", loras), tmp_path)
    words = [adapter("textual_inversion", number) for number in (0, 1)]
    request = asked(base, "weighted_sum", [pack, *words])
    both = [request.parents[0].subjects[0].model_copy(update={"name": name}) for name in "ab"]
    first = request.parents[0].model_copy(update={"subjects": both})
    method, file, _, word = saved(
        request.model_copy(update={"parents": [first, *request.parents[1:]]}), tmp_path
    )
    parts = BaseParts(base, CPU)
    for place, alone in zip((3, 4), words, strict=True):
        with wearing(parts, (method, file, 1.0, word)):
            found = parts.encode([f"a {word}-{place}"], RESOLUTION).features
        with wearing(parts, (*alone[:3], word)):
            expected = parts.encode([f"a {word}"], RESOLUTION).features
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_with_words_is_exported_in_no_format_and_says_so(
    base: Path, adapter: Maker, tmp_path: Path, form: str
) -> None:
    parents = [adapter("custom_diffusion", 0), adapter("custom_diffusion", 1)]
    _, file, _, _ = saved(asked(base, "weighted_sum", parents), tmp_path)
    with pytest.raises(CapabilityMissing, match="only those of LoRAs without words"):
        export(file, base, form, "sd1", tmp_path)
