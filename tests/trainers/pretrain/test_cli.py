"""The commands: each says what it lacks and what to do, and what it measured."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lookalike_platform.errors import Conflict, InvalidRequest, NotFound, UnknownBase
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


def test_damaged_data_is_named_with_the_command_that_makes_it_anew(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    command = f"autoencoder --start {tiny_folder} --data {data} --run {tmp_path / 'run'}"
    nouns = (data / "nouns.json").read_text()
    for damaged in (nouns[:-3], "[]", '{"held_out": []}', '{"training": 3}'):
        (data / "nouns.json").write_text(damaged)
        with pytest.raises(InvalidRequest, match=r"nouns\.json is damaged.*pretrain data"):
            invoke(command)
    (data / "nouns.json").write_text(nouns)
    for crop in (data / "photos").glob("*[3-9].jpg"):
        crop.unlink()
    with pytest.raises(NotFound, match=r"no two photographs.*pretrain data"):
        invoke(command)
    (data / "sprites/noto/cat.webp").unlink()
    with pytest.raises(NotFound, match=r"noto/cat\.webp is missing.*pretrain data"):
        invoke(f"text {tmp_path / 'start'} --data {data}")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_start_that_lacks_a_part_says_which(tiny_folder: Path, data: Path, part: str) -> None:
    start = data / "start"
    shutil.copytree(tiny_folder, start)
    shutil.rmtree(start / part)
    with pytest.raises(UnknownBase, match=f"has no {part}/.*name a diffusers folder"):
        invoke(f"latents --start {start} --data {data} --run {data / 'run'}")


def test_a_denoiser_without_a_batch_or_with_nothing_left_to_do_says_what_to_change(
    tiny_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "latents"
    cache.mkdir()
    np.save(cache / "latents.npy", np.zeros((4, 4, 16, 16), np.float16))
    (cache / "captions.json").write_text(json.dumps(["a cat"] * 4))
    command = f"denoiser --start {tiny_folder} --run {tmp_path} --steps 1 --batch-size"
    with pytest.raises(InvalidRequest, match=r"batch of 5 is more than the 4 cached.*--batch-size"):
        invoke(f"{command} 5")
    invoke(f"{command} 4")
    with pytest.raises(Conflict, match=r"at step 1 already.*--steps.*--run"):
        invoke(f"{command} 4")


def test_an_autoencoder_that_is_done_says_so(tiny_folder: Path, data: Path) -> None:
    command = f"autoencoder --start {tiny_folder} --data {data} --run {data / 'run'} --steps 1"
    invoke(command)
    with pytest.raises(Conflict, match=r"at step 1 already.*--steps.*--run"):
        invoke(command)


@pytest.mark.parametrize(
    ("notes", "lacking"),
    [('{"history": "short"}', "caveat: Field required"), ("{", r"notes\.json: Invalid JSON")],
)
def test_notes_that_lack_a_text_are_refused_before_anything_is_painted(
    tiny_folder: Path, data: Path, notes: str, lacking: str
) -> None:
    (data / "notes.json").write_text(notes)
    with pytest.raises(InvalidRequest, match=lacking):
        invoke(f"card {tiny_folder} --notes {data / 'notes.json'} --data {data} --run {data}")


def test_a_folder_without_photographs_is_refused(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"no photograph in .*own"):
        invoke(f"evaluate {tiny_folder} --data {data} --run {data} --photos {tmp_path / 'own'}")


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
