"""Options that would change nothing: the list against the methods themselves."""

from pathlib import Path
from typing import Any

import pytest

from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.defaults import KEY
from lookalike_trainers.method_configs import (
    EdLoraConfig,
    LoraConfig,
    PerfusionConfig,
    TextualInversionConfig,
    TLoraConfig,
)
from lookalike_trainers.unused import unused_options
from support_methods import made
from support_models import save_base

NAMES = [info.name for info in METHODS]
RATES = {"learning_rate": 0.11, "text_encoder_learning_rate": 0.12, "token_learning_rate": 0.13}


def refused(config: TrainingConfig) -> list[str]:
    return [problem.path.removeprefix("config.") for problem in unused_options(config)]


@pytest.mark.parametrize(
    ("config", "unread"),
    [
        (
            TextualInversionConfig(learning_rate=5e-9, prompt="my {trigger}", weight_decay=1.0),
            ["weight_decay", "learning_rate", "prompt"],
        ),
        (TextualInversionConfig(templates=None, prompt="my {trigger}"), []),
        (
            LoraConfig(initializer="dog", token_learning_rate=0.1),
            ["token_learning_rate", "initializer"],
        ),
        (LoraConfig(initializer="dog", token_learning_rate=0.1, token_vectors=1), []),
        (LoraConfig(text_encoder_learning_rate=0.1), ["text_encoder_learning_rate"]),
        (LoraConfig(text_encoder_learning_rate=0.1, train_text_encoder=True), []),
        (TLoraConfig(weight_decay=0.1), ["weight_decay"]),
        (TLoraConfig(weight_decay=0), []),
        (PerfusionConfig(prompt="my {trigger}", learning_rate=0.1), []),
        (EdLoraConfig(attention_regularization=0.1), ["attention_regularization"]),
        (EdLoraConfig(attention_regularization=0.1, masked_loss=True), []),
        (
            LoraConfig(
                prior={"subject_set": "set_1", "num_images": 5, "prompt": "my dog", "seed": 3}
            ),
            ["prior.num_images", "prior.seed"],
        ),
        (LoraConfig(prior={"num_images": 5, "seed": 3}), []),
    ],
)
def test_what_a_run_would_not_read_is_named(config: TrainingConfig, unread: list[str]) -> None:
    assert refused(config) == unread


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_any_base_may_be_given(name: str) -> None:
    info = next(info for info in METHODS if info.name == name)
    large = {
        field: about.json_schema_extra[KEY]
        for field, about in info.config.model_fields.items()
        if isinstance(about.json_schema_extra, dict) and KEY in about.json_schema_extra
    }
    for defaults in ({}, large):
        assert refused(info.config.model_validate(info.config(**defaults).model_dump())) == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("options", [{}, {"train_text_encoder": True, "token_vectors": 1}])
@pytest.mark.parametrize("name", NAMES)
def test_a_method_reads_the_rates_that_are_not_named_and_no_other(
    base: Path, name: str, options: dict[str, Any]
) -> None:
    info = next(info for info in METHODS if info.name == name)
    allowed = {
        option: value
        for option, value in options.items()
        if not str(info.config.model_fields[option].annotation).startswith("typing.Literal")
    }
    method, _ = made(base, name, **RATES, **allowed)
    groups = method.parameter_groups()
    unread = refused(info.config(weight_decay=0.5, **RATES, **allowed))
    used = {group["lr"] for group in groups}
    assert {rate for rate in RATES if rate not in unread} == {
        rate for rate, value in RATES.items() if value in used
    }
    assert ("weight_decay" in unread) != any(group.get("weight_decay", 0.5) for group in groups)
