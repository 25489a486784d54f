"""The commands in the wrong order: each says which one comes first."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lookalike_platform.errors import NotFound
from lookalike_trainers.pretrain.cli import app


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("autoencoder --start {base} --data {empty} --run {empty}", "lookalike pretrain data"),
        ("denoiser --start {base} --run {empty}", "lookalike pretrain latents"),
        ("latents --start {empty} --data {data} --run {empty}", "diffusers folder"),
        ("evaluate {empty} --data {data} --run {empty}", "diffusers folder"),
        ("card {base} --notes {empty} --data {data} --run {empty}", "`history`"),
    ],
)
def test_a_stage_without_its_forerunner_says_what_to_do(
    tiny_folder: Path, tmp_path: Path, command: str, said: str
) -> None:
    nouns = tmp_path / "nouns.json"
    nouns.write_text(json.dumps({"training": ["cat"], "held_out": []}))
    words = command.format(base=tiny_folder, data=tmp_path, empty=tmp_path / "empty")
    with pytest.raises(NotFound, match=said):
        CliRunner().invoke(app, words.split(), catch_exceptions=False)
