"""The commands: each says which one comes first, and what it measured."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lookalike_platform.errors import NotFound
from lookalike_trainers.pretrain.cli import app
from lookalike_trainers.pretrain.evaluate import autoencoder_bars
from lookalike_trainers.pretrain.nouns import STYLES
from lookalike_trainers.pretrain.photos import crops_below, load_crops, save_crops, split_crops
from lookalike_trainers.pretrain.scenes import Sprites


@pytest.fixture
def data(sprites: Sprites, tmp_path: Path) -> Path:
    """What `lookalike pretrain data` would make: one noun, crops of two photographs."""
    folder = tmp_path / "data"
    for style in STYLES:
        (folder / "sprites" / style).mkdir(parents=True)
        Image.fromarray(sprites["cat", style]).save(folder / "sprites" / style / "cat.webp")
    (folder / "nouns.json").write_text(json.dumps({"training": ["cat"], "held_out": []}))
    save_crops(
        [photograph(tmp_path / f"{name}.png") for name in ("sea", "hill")], folder / "photos"
    )
    return folder


def photograph(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(path.name).randbytes(200 * 200 * 3)
    Image.frombytes("RGB", (200, 200), noise).save(path)
    return path


def invoke(command: str) -> str:
    return CliRunner().invoke(app, command.split(), catch_exceptions=False).output


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
    tiny_folder: Path, data: Path, tmp_path: Path, command: str, said: str
) -> None:
    with pytest.raises(NotFound, match=said):
        invoke(command.format(base=tiny_folder, data=data, empty=tmp_path / "empty"))


def test_the_autoencoder_is_measured_on_photographs_never_seen_without_a_judge(
    tiny_folder: Path, sprites: Sprites, data: Path, tmp_path: Path
) -> None:
    photograph(tmp_path / "own/garden/dusk.png")
    run, own = tmp_path / "run", tmp_path / "own"
    said = invoke(
        f"evaluate {tiny_folder} --data {data} --run {run} --prompts 5 --photos {own} "
        "--autoencoder-only"
    )
    _, held = split_crops(load_crops(data / "photos"))
    bars = autoencoder_bars(tiny_folder, ["cat"], sprites, held, crops_below(own), prompts=5)
    assert [bar.name for bar in bars][1:] == [
        "autoencoder PSNR, held-out photographs (dB)",
        "autoencoder PSNR, photographs never seen (dB)",
    ]
    assert all(f"{bar.measured:.3f}" in said for bar in bars[1:])
    assert not run.exists()
