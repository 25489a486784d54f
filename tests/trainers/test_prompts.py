import pytest

from lookalike_trainers.config import PriorConfig, TrainingConfig
from lookalike_trainers.method_configs import LoraConfig, TextualInversionConfig
from lookalike_trainers.prompts import (
    class_caption,
    class_prompt,
    instance_captions,
    validation_prompt,
)
from lookalike_trainers.templates import OBJECT, STYLE


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, "a sks cat"),
        ("", "a sks cat"),
        ("a cat asleep on a sofa", "a sks cat asleep on a sofa"),
        ("a caterpillar beside a cat", "a caterpillar beside a sks cat"),
        ("two cats", "sks cat, two cats"),
        ("A Cat at night", "A sks cat at night"),
        ("asleep on a sofa", "sks cat, asleep on a sofa"),
        ("my sks cat", "my sks cat"),
        ("sks, asleep", "sks, asleep"),
    ],
)
def test_a_caption_names_the_subject_by_its_trigger(caption: str | None, expected: str) -> None:
    assert instance_captions(caption, LoraConfig(), "cat") == [expected]


def test_the_runs_own_prompt_takes_trigger_and_noun() -> None:
    config = LoraConfig(prompt="a photo of {trigger} the {class_noun}", trigger="zwx")
    assert instance_captions(None, config, "dog") == ["a photo of zwx the dog"]


@pytest.mark.parametrize(
    "prompt", ["a {trigger} {animal}", "a {} {trigger}", "a {trigger", "{trigger.x}", "{trigger!r}"]
)
def test_a_prompt_with_other_placeholders_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"\{trigger\}"):
        LoraConfig(prompt=prompt)


def test_a_prompt_without_the_trigger_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\{trigger\}"):
        LoraConfig(prompt="a {class_noun}")


def test_class_images_have_the_plain_noun_unless_told_otherwise() -> None:
    assert class_prompt(LoraConfig(prior=PriorConfig()), "dog") == "a dog"
    assert class_prompt(LoraConfig(prior=PriorConfig(prompt="a puppy")), "dog") == "a puppy"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a sks cat", "a cat"),
        ("a sks  cat asleep on a sofa", "a cat asleep on a sofa"),
        ("sks cat, two cats", "cat, two cats"),
        ("a painting of SKS", "a painting of cat"),
        ("sks caterpillars and a masks shop", "cat caterpillars and a masks shop"),
    ],
)
def test_the_class_has_the_same_caption_without_the_trigger(caption: str, expected: str) -> None:
    assert class_caption(caption, LoraConfig(), "cat") == expected


def test_a_word_is_learned_from_templates_where_photos_have_no_captions() -> None:
    objects = instance_captions(None, TextualInversionConfig(), "cat")
    assert objects == [template.replace("{}", "sks") for template in OBJECT]
    styles = instance_captions(None, TextualInversionConfig(templates="style"), "painting")
    assert styles == [template.replace("{}", "sks") for template in STYLE]
    assert instance_captions("a cat asleep", TextualInversionConfig(), "cat") == ["a sks asleep"]
    without = TextualInversionConfig(templates=None)
    assert instance_captions(None, without, "cat") == ["a sks cat"]


def test_a_style_is_called_by_what_is_in_it() -> None:
    phrase = TextualInversionConfig(templates="style").phrase
    assert phrase.format(trigger="zwx", class_noun="house") == "house in the style of zwx"
    assert LoraConfig().phrase.format(trigger="zwx", class_noun="dog") == "zwx dog"


def test_a_style_leaves_the_class_without_it() -> None:
    config = TextualInversionConfig(templates="style", trigger="sks")
    assert class_caption("a cat in the style of sks, at night", config, "cat") == "a cat, at night"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(), None),
        (LoraConfig(validation={}), "a sks cat"),
        (TextualInversionConfig(validation={}, trigger="sks"), "a sks"),
        (LoraConfig(validation={"prompt": "{trigger} the {class_noun}"}), "sks the cat"),
    ],
)
def test_validation_shows_the_subject_as_the_method_calls_it(
    config: TrainingConfig, expected: str | None
) -> None:
    assert validation_prompt(config, "cat") == expected


def test_a_validation_prompt_has_no_other_placeholders() -> None:
    with pytest.raises(ValueError, match=r"\{trigger\}"):
        LoraConfig(validation={"prompt": "a {dog}"})
