from pathlib import Path

import pytest
from pydantic import ValidationError

from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.manifest import Manifest, version_id, weights_record
from lookalike_registry.tensor_file import ADAPTER_NAME, save_tensors
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


def test_the_weights_of_other_methods_are_described_too(tmp_path: Path) -> None:
    import torch

    path = tmp_path / ADAPTER_NAME
    tensors = {
        "lora.unet.mid_block.attentions.0.proj_in.down": torch.zeros(3, 8),
        "lora.unet.mid_block.attentions.0.proj_in.up": torch.zeros(8, 3),
        "tokens.text_encoder": torch.zeros(2, 16),
    }
    save_tensors(path, "pivotal", tensors, {}, {})
    weights = weights_record(path)
    assert (weights.file, weights.dtype) == (ADAPTER_NAME, "F32")
    assert (weights.token_count, weights.token_width) == (2, 16)
    shape = weights.modules["unet.mid_block.attentions.0.proj_in"]
    assert (shape.rank, shape.alpha) == (3, 3.0)


def test_a_record_from_before_other_methods_is_of_a_lora(tmp_path: Path) -> None:
    plain = manifest_of(finished_run(tmp_path), "job_1").model_dump()
    del plain["weights"]["file"]
    assert Manifest.model_validate(plain).weights.file == WEIGHTS_NAME


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
