"""A merge's process heeds a stop at every step, and leaves nothing that looks finished."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.compose.low_rank import LowRank
from lookalike_registry.manifest import SubjectRecord
from lookalike_trainers.composition import process
from lookalike_trainers.composition.request import CompositionRequest, MergeOptions
from lookalike_trainers.launcher import STOP_FILE
from lookalike_trainers.methods import composition
from lookalike_trainers.methods.composition import Change
from lookalike_trainers.voice import Stopped
from support_merging import parent_file
from support_models import RESOLUTION, save_base
from support_sampling import save_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """With the request of a merge by TIES of two LoRAs, and torch as it was afterwards."""
    base = save_base(tmp_path / "base")
    parents = []
    for seed, word in enumerate(("sks", "zwx")):
        file = tmp_path / f"{word}.safetensors"
        save_adapter(file, base, seed)
        subject = SubjectRecord(
            name=word,
            trigger=word,
            class_noun="dog",
            phrase="{trigger} {class_noun}",
            learned=False,
        )
        parents.append(parent_file("lora", file, 1.0, subject))
    request = CompositionRequest(
        name="duo",
        strategy="ties",
        options=MergeOptions(),
        parents=parents,
        base_folder=base,
        family="sd1",
        prediction_type="epsilon",
        resolution=RESOLUTION,
        cache=tmp_path / "cache",
        device="cpu",
    )
    (tmp_path / "request.json").write_text(request.model_dump_json())
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def test_a_stop_is_heeded_at_the_next_layer_and_once_more_before_the_result(folder: Path) -> None:
    told: list[dict[str, Any]] = []
    process.run(folder, told.append)
    result = folder / "result" / "result.json"
    first = result.read_text()
    progress = [message for message in told if message["type"] == "progress"]
    total = progress[-1]["total"]
    assert total > 2
    assert [one["step"] for one in progress[-total:]] == list(range(1, total + 1))
    for asked_at in (1, total):
        result.unlink()
        heard: list[int] = []

        def say(message: dict[str, Any], asked_at: int = asked_at, heard: Any = heard) -> None:
            if message["type"] == "progress":
                heard.append(message["step"])
                if message["step"] == asked_at:
                    (folder / STOP_FILE).write_text("drain")

        with pytest.raises(Stopped):
            process.run(folder, say)
        assert heard[-1] == asked_at
        assert not result.exists()
        (folder / STOP_FILE).unlink()
        process.run(folder, told.append)
        assert result.read_text() == first


def test_a_file_that_does_not_fit_its_base_is_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, table = composition.save, "text_encoder.embeddings.token_embedding"

    def save(change: Change, *where: Any) -> Path:
        name, pair = next(iter(change.products.items()))
        copy = LowRank(pair.up.clone(), pair.down.clone())
        return whole(Change({name: pair, table: copy}), *where)

    monkeypatch.setattr(composition, "save", save)
    with pytest.raises(InvalidRequest) as refused:
        process.run(folder, lambda message: None)
    assert [one.path for one in refused.value.fields] == [table]
    assert not (folder / "result" / "result.json").exists()


def flip_a_bit(file: Path) -> None:
    """Of a number's middle: what comes of it is finite and of the same shape."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x40
    file.write_bytes(data)


def test_a_parent_with_one_bit_flipped_is_refused_by_name(folder: Path) -> None:
    flip_a_bit(folder / "zwx.safetensors")
    with pytest.raises(InvalidRequest, match=r"^zwx@1: The file is damaged"):
        process.run(folder, lambda message: None)
    assert not list((folder / "result").iterdir())


def test_a_parent_that_does_not_fit_the_base_is_refused_by_name(folder: Path) -> None:
    """Though it is what was registered: with each tensor that does not fit."""
    request = CompositionRequest.model_validate_json((folder / "request.json").read_text())
    wide = save_base(folder / "wide", "sdxl")
    file = folder / "wide.safetensors"
    save_adapter(file, wide, 2)
    first, second = request.parents
    stray = parent_file("lora", file, 1.0, second.subjects[0])
    asked = request.model_copy(update={"parents": [first, stray]})
    (folder / "request.json").write_text(asked.model_dump_json())
    with pytest.raises(InvalidRequest, match=r"^zwx@1: ") as refused:
        process.run(folder, lambda message: None)
    assert refused.value.fields
    assert not list((folder / "result").iterdir())
