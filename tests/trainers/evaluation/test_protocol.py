"""The protocol with a trainer and a painter that only pretend: what is asked, kept and tabled."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.evaluation import protocol as bench
from lookalike_trainers.evaluation import table
from lookalike_trainers.evaluation.dreambench import (
    KNOWN,
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    Subject,
    read_subjects,
)
from lookalike_trainers.evaluation.encoders import Judges
from lookalike_trainers.evaluation.protocol import Contender, Protocol
from support_images import photo, picture


class MeanColour:
    """An encoder and a judge of prompts without a network."""

    name = "colour"

    def __init__(self, digest: str = "1") -> None:
        self.digest = digest

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [list(image.convert("RGB").resize((2, 2)).tobytes()) for image in images]
        return torch.tensor(pixels).float()

    def score_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str
    ) -> torch.Tensor:
        return torch.tensor([len(prompt) / 100 for prompt in prompts])


JUDGES = Judges((MeanColour(),), MeanColour())
PROTOCOL = Protocol({"base": "none"}, images_per_prompt=2, class_images=3, seed=10)
LORA = Contender("lora", "lora", {"steps": 3})
FULL = Contender("full", "dreambooth", {"steps": 3}, calls="zwx {class_noun}")


@dataclass
class Workshop:
    """Pretends to train and paint, and remembers what it was asked."""

    trained: list[tuple[str, str]] = field(default_factory=list)
    asked: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = field(default_factory=list)

    def train(self, contender: Contender, subject: Subject) -> Path:
        self.trained.append((contender.name, subject.name))
        return Path(f"{contender.name}-{subject.name}")

    def paint(
        self, contender: Contender, adapter: Path, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[list[Image.Image]]:
        self.asked.append((adapter.name, tuple(prompts), tuple(seeds)))
        return [[picture(len(prompt) + seed) for seed in seeds] for prompt in prompts]


@pytest.fixture
def subjects(tmp_path: Path) -> list[Subject]:
    for name, count in (("dog", 2), ("teapot", 3)):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "subjects" / name / f"{number}.jpg").write_bytes(photo(number))
    return read_subjects(tmp_path / "subjects")


def run(
    workshop: Workshop,
    subjects: list[Subject],
    folder: Path,
    protocol: Protocol = PROTOCOL,
    judges: Judges = JUDGES,
    contenders: Sequence[Contender] = (LORA, FULL),
) -> list[bench.Cell]:
    return bench.run(protocol, contenders, subjects, folder, judges, workshop.train, workshop.paint)


def test_the_papers_lists_are_whole() -> None:
    assert len(OBJECT_PROMPTS) == len(set(OBJECT_PROMPTS)) == 25
    assert len(LIVE_PROMPTS) == len(set(LIVE_PROMPTS)) == 25
    assert len(KNOWN) == 30
    assert sum(about.live for about in KNOWN.values()) == 9


def test_every_method_meets_every_subject_with_the_prompts_of_its_kind(
    subjects: list[Subject], tmp_path: Path
) -> None:
    workshop = Workshop()
    run(workshop, subjects, tmp_path / "results")
    assert workshop.trained == [
        ("lora", "dog"), ("full", "dog"), ("lora", "teapot"), ("full", "teapot"),
    ]  # fmt: skip
    asked = {
        (adapter, len(prompts)): (prompts, seeds) for adapter, prompts, seeds in workshop.asked
    }
    assert asked["lora-dog", 25][0][10] == "a sks dog wearing a red hat"
    assert asked["full-teapot", 25][0][13] == "a zwx teapot floating on top of water"
    assert asked["lora-dog", 25][1] == (10, 11)
    # The class begins at noise that no class image of `prior`, whose seeds end below, began at.
    assert asked["lora-dog", 1] == (("a dog",), (2**31 + 10, 2**31 + 11, 2**31 + 12))


def test_a_stopped_protocol_goes_on_and_computes_nothing_twice(
    subjects: list[Subject], tmp_path: Path
) -> None:
    class Interrupted(Workshop):
        def train(self, contender: Contender, subject: Subject) -> Path:
            if len(self.trained) == 3:
                raise KeyboardInterrupt
            return super().train(contender, subject)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), subjects, tmp_path / "results")
    again = Workshop()
    cells = run(again, subjects, tmp_path / "results")
    assert again.trained == [("full", "teapot")]
    idle = Workshop()
    assert run(idle, subjects, tmp_path / "results") == cells
    assert idle.asked == []


def test_whatever_decides_a_cell_makes_it_another_one(subjects: list[Subject]) -> None:
    dog = subjects[0]
    longer = replace(LORA, config={"steps": 4})
    keys = {
        bench.cell_key(PROTOCOL, LORA, dog, JUDGES),
        bench.cell_key(PROTOCOL, FULL, dog, JUDGES),
        bench.cell_key(PROTOCOL, longer, dog, JUDGES),
        bench.cell_key(PROTOCOL, LORA, subjects[1], JUDGES),
        bench.cell_key(replace(PROTOCOL, seed=1), LORA, dog, JUDGES),
        bench.cell_key(replace(PROTOCOL, decided_by={"base": "other"}), LORA, dog, JUDGES),
        bench.cell_key(PROTOCOL, LORA, dog, Judges((MeanColour("2"),), MeanColour())),
        bench.cell_key(PROTOCOL, LORA, dog, Judges((MeanColour("2"),), MeanColour("2"))),
    }
    dog.photos[0].write_bytes(photo(77))
    keys.add(bench.cell_key(PROTOCOL, LORA, dog, JUDGES))
    assert len(keys) == 9


def test_the_row_of_a_method_is_the_mean_of_its_subjects(
    subjects: list[Subject], tmp_path: Path
) -> None:
    cells = run(Workshop(), subjects, tmp_path / "results")
    rows = table.summary(cells)
    own = [
        fmean(cell.scores.subject_fidelity["colour"]) for cell in cells if cell.contender == "lora"
    ]
    estimate = rows["lora"]["subject fidelity ↑ (colour)"]
    assert estimate.mean == pytest.approx(fmean(own))
    assert estimate.count == 2
    assert estimate.low == pytest.approx(min(own))
    assert list(rows) == ["lora", "full", "real photos"]
    assert list(rows["real photos"]) == ["subject fidelity ↑ (colour)"]


def test_the_table_is_markdown_and_json(subjects: list[Subject], tmp_path: Path) -> None:
    cells = run(Workshop(), subjects, tmp_path / "results")
    head, rule, *rows = table.markdown(cells).splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert rows[-1].startswith("| real photos | ")
    kept = json.loads(json.dumps(table.as_json(cells)))
    assert [bench.Cell.model_validate(cell) for cell in kept["cells"]] == cells


def test_of_one_subject_the_interval_is_over_its_pictures(
    subjects: list[Subject], tmp_path: Path
) -> None:
    cells = run(Workshop(), subjects[:1], tmp_path / "results", contenders=[LORA])
    assert table.summary(cells)["lora"]["subject fidelity ↑ (colour)"].count == 50


def test_a_subject_says_what_it_is_in_its_own_file(tmp_path: Path) -> None:
    folder = tmp_path / "rex"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo())
    with pytest.raises(InvalidRequest, match=r"subject\.json"):
        read_subjects(tmp_path)
    (folder / "subject.json").write_text('{"class_noun": "lizard", "live": true}')
    [rex] = read_subjects(tmp_path)
    assert (rex.about.class_noun, rex.prompts) == ("lizard", LIVE_PROMPTS)


def test_folders_that_are_no_subjects_are_named(tmp_path: Path) -> None:
    (tmp_path / "teapot").mkdir()
    with pytest.raises(InvalidRequest, match="teapot: has no photos"):
        read_subjects(tmp_path)
    with pytest.raises(InvalidRequest, match="no folder"):
        read_subjects(tmp_path / "nowhere")
