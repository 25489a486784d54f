from pathlib import Path

import pytest
from pydantic import ValidationError

from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.manifest import Manifest, version_id, weights_record
from support_registry import finished_run, manifest_of


def test_the_record_survives_json(tmp_path: Path) -> None:
    manifest = manifest_of(finished_run(tmp_path), "job_1")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_weights_are_described_from_their_file(tmp_path: Path) -> None:
    path = finished_run(tmp_path)[WEIGHTS_NAME]
    weights = weights_record(path)
    assert (weights.bytes, weights.dtype) == (path.stat().st_size, "F32")
    (shape,) = weights.modules.values()
    assert (shape.rank, shape.alpha) == (2, 4.0)
    assert list(weights.modules) == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]


def test_tags_carry_what_is_known_as_text(tmp_path: Path) -> None:
    tags = manifest_of(finished_run(tmp_path), "job_1").to_tags()
    assert tags["lookalike.job_id"] == "job_1"
    assert tags["lookalike.seed"] == "0"
    assert "lookalike.consent" not in tags
    assert all(isinstance(value, str) for value in tags.values())


def test_a_job_always_makes_the_same_version_id() -> None:
    assert version_id("job_01abc") == "adv_01abc"


def test_unknown_keys_and_impossible_names_are_refused(tmp_path: Path) -> None:
    plain = manifest_of(finished_run(tmp_path), "job_1").model_dump()
    with pytest.raises(ValidationError, match="surprise"):
        Manifest.model_validate(plain | {"surprise": 1})
    plain["identity"]["concept"] = "../x"
    with pytest.raises(ValidationError, match="concept"):
        Manifest.model_validate(plain)
