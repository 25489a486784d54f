"""Bases of Stable Diffusion's size begin with other rates than the bundled one."""

from dataclasses import replace
from pathlib import Path

import pytest

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.evaluation.bench import contender

LARGE = {
    "lora": {"learning_rate": 1e-4},
    "dreambooth": {"learning_rate": 5e-6, "batch_size": 1, "steps": 800},
    "textual_inversion": {"token_learning_rate": 2e-3, "steps": 3000},
    "custom_diffusion": {"learning_rate": 4e-5, "token_learning_rate": 4e-5, "steps": 250},
    "svdiff": {"learning_rate": 1e-3},
}


@pytest.fixture
def small(tmp_path: Path) -> bases.Base:
    return bases.resolve("pocket-64", Settings(home=tmp_path))


@pytest.mark.parametrize("method", LARGE)
def test_a_large_base_has_defaults_of_its_own(small: bases.Base, method: str) -> None:
    config = contender("row", method, {}, replace(small, resolution=512)).config
    assert {name: config[name] for name in LARGE[method]} == LARGE[method]


@pytest.mark.parametrize("method", [info.name for info in METHODS])
def test_the_bundled_base_has_the_schemas(small: bases.Base, method: str) -> None:
    info = next(info for info in METHODS if info.name == method)
    trigger = contender("row", method, {}, small).config["trigger"]
    plain = info.config(trigger=trigger).model_dump(mode="json")
    assert contender("row", method, {}, small).config == plain


def test_what_is_given_counts_whatever_the_base(small: bases.Base) -> None:
    config = contender("row", "lora", {"learning_rate": 0.5}, replace(small, resolution=512)).config
    assert config["learning_rate"] == 0.5


def test_the_schema_tells_them() -> None:
    info = next(info for info in METHODS if info.name == "lora")
    rate = info.config.model_json_schema()["properties"]["learning_rate"]
    assert (rate["default"], rate["default_on_large_bases"]) == (1e-3, 1e-4)
    assert "256 pixels" in rate["description"]
