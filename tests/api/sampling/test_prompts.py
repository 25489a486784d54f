import pytest

from lookalike_api.sampling.prompts import Subject, bind
from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import spell

REX = Subject("rex", "sks", "dog")
TOM = Subject("tom", "zwx", "cat")


@pytest.mark.parametrize(
    ("prompt", "bound"),
    [
        ("<rex> on the moon with <tom>", "sks dog on the moon with zwx cat"),
        ("<rex> beside <tom>, <rex> again", "sks dog beside zwx cat, sks dog again"),
        ("a photo of sks dog and zwx cat", "a photo of sks dog and zwx cat"),
        ("<rex><tom>", "sks dogzwx cat"),
        ("SKS, ZWX", "SKS, ZWX"),
    ],
)
def test_a_name_in_brackets_becomes_the_subjects_phrase(prompt: str, bound: str) -> None:
    assert bind(prompt, [REX, TOM]) == (bound, [])


@pytest.mark.parametrize("prompt", ["a dog", "sksy dog", "rex on the moon", "tasks"])
def test_a_prompt_that_forgets_a_subject_gets_a_warning(prompt: str) -> None:
    bound, [warning] = bind(prompt, [REX])
    assert bound == prompt
    assert "<rex>" in warning
    assert "sks dog" in warning


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest) as refused:
        bind("<rex> and <max>", [REX])
    [problem] = refused.value.fields
    assert problem.path == "prompt"
    assert "<max>" in problem.message
    assert "<rex>" in problem.message


@pytest.mark.parametrize("prompt", ["a < b > c", "<>", "< rex >", "1<2"])
def test_brackets_around_no_name_are_left_alone(prompt: str) -> None:
    assert bind(prompt, []) == (prompt, [])


def test_subjects_of_one_trigger_word_may_mix_and_that_is_said() -> None:
    _, [warning] = bind("<rex> and <max>", [REX, Subject("max", "SKS", "cat")])
    assert "rex and max" in warning
    assert "sks" in warning


ANN = Subject("ann", "sks", "doll", word="adv_1", phrase="{trigger}")
BOB = Subject("bob", "sks", "car", word="adv_2")


@pytest.mark.parametrize(
    ("prompt", "bound"),
    [
        ("<ann> in <bob>", "adv_1 in adv_2 car"),
        ("<bob> alone, with <ann>", "adv_2 car alone, with adv_1"),
    ],
)
def test_learned_words_of_one_trigger_do_not_meet(prompt: str, bound: str) -> None:
    assert bind(prompt, [ANN, BOB]) == (bound, [])


def test_a_learned_words_trigger_is_written_as_its_private_word() -> None:
    assert bind("a SKS on tasks", [ANN]) == ("a adv_1 on tasks", [])


@pytest.mark.parametrize(
    ("prompt", "bound"),
    [
        ("<my-sks-dog> and a sks", "adv_1 dog and a adv_1"),
        ("<sks>, SKS-2, mask-sks", "adv_1 dog, SKS-2, mask-adv_1"),
        ("a \N{LATIN SMALL LETTER LONG S}ks by an unclosed <sks", "a adv_1 by an unclosed <adv_1"),
    ],
)
def test_a_trigger_within_a_name_or_a_longer_trigger_is_let_be(prompt: str, bound: str) -> None:
    learned = Subject("my-sks-dog", "sks", "dog", word="adv_1")
    groups = {"sks": [learned]}
    others = [Subject("rex", "sks-2", "cat")]
    assert bind(prompt, [*others, learned], groups)[0] == bound
    assert bind(prompt, [learned, *others], groups)[0] == bound


def test_a_longer_trigger_that_has_one_of_two_in_it_is_not_ambiguous() -> None:
    both = [Subject(one, "sks", one, word=f"adv_{one}") for one in ("ann", "cat")]
    bound, _ = bind("a sks-2", [*both, Subject("dan", "sks-2", "dog", word="adv_dan")])
    assert bound == "a adv_dan"


def test_a_name_that_has_the_trigger_of_two_in_it_is_not_ambiguous() -> None:
    names = [Subject(f"{one}-sks", "sks", one, word=f"adv_{one}") for one in ("ann", "bob")]
    assert bind("<ann-sks> meets <bob-sks>", names) == ("adv_ann ann meets adv_bob bob", [])


@pytest.mark.parametrize("other", [BOB, REX])
def test_a_bare_trigger_that_two_subjects_answer_to_is_refused(other: Subject) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bind("a sks", [ANN, other])
    assert f"<ann> or <{other.name}>" in refused.value.fields[0].message


def test_the_words_of_an_adapters_further_subjects_become_private_too() -> None:
    """Custom Diffusion of several subjects: sks, sks-2, …; each is then its own tokens."""
    bound, _ = bind("a sks dog and a sks-2 cat", [Subject("rex", "sks", "dog", "adv_1")])
    assert bound == "a adv_1 dog and a adv_1-2 cat"
    learned = {"adv_1": ["<adv_1>"], "adv_1-2": ["<adv_1-2>"]}
    assert spell(bound, learned) == "a <adv_1> dog and a <adv_1-2> cat"
