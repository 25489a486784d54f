"""DreamBench on this machine: real trainings of a tiny base, from the command line on."""

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from lookalike_platform.bases import Base, resolve
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation import bench
from lookalike_trainers.evaluation.bench import Workshop, contender
from lookalike_trainers.evaluation.dreambench import read_subjects
from lookalike_trainers.rare_tokens import rare_words
from lookalike_trainers.run_request import RunRequest
from support_cli import Lookalike, runner
from support_images import photo
from support_methods import CPU
from support_models import save_base
from support_sampling import LIBRARY_WARNINGS

ROWS = """
[low]
method = "lora"
rank = 1

[high]
method = "lora"
rank = 3
"""


@pytest.fixture
def lookalike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Lookalike:
    monkeypatch.setenv("LOOKALIKE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOOKALIKE_DEVICE", "cpu")
    return runner(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    (tmp_path / "subjects" / "teapot").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "subjects" / "teapot" / f"{number}.jpg").write_bytes(photo(number))
    (tmp_path / "rows.toml").write_text(ROWS)
    return tmp_path


@pytest.mark.processes
@pytest.mark.filterwarnings(*[mark.args[0] for mark in LIBRARY_WARNINGS])
def test_a_table_comes_out_and_nothing_is_computed_twice(
    lookalike: Lookalike, folder: Path
) -> None:
    def bench(*more: object) -> tuple[str, str]:
        ran = lookalike(
            "dreambench", folder / "subjects", "--config", folder / "rows.toml",
            "--base", folder / "base", "--out", folder / "out",
            "--set", "steps=1", "--set", "batch_size=1",
            "--prompts", 2, "--images", 2, "--class-images", 2, *more,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        return ran.out, ran.err

    table, first = bench()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| low",
        "| high",
        "| real photos",
    ]
    assert (folder / "out" / "table.md").read_text() == table.rstrip("\n") + "\n"
    assert first.count("trained 1 steps") == 2

    kept, again = bench("--json")
    assert "trained" not in again
    assert "low on teapot: known" in again
    assert set(json.loads(kept)["rows"]) == {"low", "high", "real photos"}


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve("pocket-64", Settings(home=tmp_path_factory.mktemp("home")))


def test_options_a_method_does_not_have_are_named_with_their_row(pocket: Base) -> None:
    with pytest.raises(InvalidRequest, match=r"low\.rnk"):
        contender("low", "lora", {"rnk": 3}, pocket)
    with pytest.raises(InvalidRequest, match="no method 'lara'"):
        contender("low", "lara", {}, pocket)


def test_a_row_calls_its_subject_as_its_method_does(pocket: Base) -> None:
    rare = rare_words(pocket.folder)[0]
    assert contender("a", "lora", {}, pocket).calls == f"{rare} {{class_noun}}"
    assert contender("a", "lora", {"trigger": "sks"}, pocket).calls == "sks {class_noun}"
    assert contender("a", "textual_inversion", {}, pocket).calls == rare


def test_subject_sets_of_the_database_are_refused(pocket: Base) -> None:
    with pytest.raises(InvalidRequest, match="subject sets"):
        contender("a", "custom_diffusion", {"also": ["set_1"]}, pocket)


class Done:
    """A training that is over at once."""

    def __init__(self, request: RunRequest, folder: Path) -> None:
        (folder / "result").mkdir(parents=True)
        (folder / "result" / "result.json").write_text('{"weights": "adapter.safetensors"}')
        self.said = [{"type": "done", "outcome": "complete"}]

    def messages(self) -> list[dict[str, str]]:
        return self.said

    def kill(self, grace: float) -> None:
        pass


def test_another_number_of_processes_or_zero_stage_is_another_training_and_cell(
    pocket: Base, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process brings a batch of its own to each step."""
    monkeypatch.setattr(bench, "launch", Done)
    (subject,) = read_subjects(folder / "subjects")

    def workshop(**settings: int) -> Workshop:
        own = Settings(home=folder / "home", **settings)
        return Workshop(pocket, BaseParts(pocket.folder, CPU), own, folder / "runs")

    def trained(settings: dict[str, int], options: dict[str, JsonValue]) -> Path:
        return workshop(**settings).train(contender("a", "lora", options, pocket), subject)

    plain = trained({}, {})
    for other in ({"num_processes": 2}, {"zero_stage": 2}):
        assert trained(other, {}) != plain
        assert workshop(**other).decides() != workshop().decides()
    # What the row itself asks for goes before the operator's setting.
    asked: dict[str, JsonValue] = {"num_processes": 2, "zero_stage": 0}
    assert trained({}, asked) == trained({"num_processes": 4, "zero_stage": 2}, asked)


def test_rows_are_named_in_the_file_or_on_the_command_line_but_not_in_both(
    lookalike: Lookalike, folder: Path
) -> None:
    rows = ("--config", folder / "rows.toml", "--method", "lora")
    ran = lookalike("dreambench", folder / "subjects", *rows)
    assert ran.code == 1
    assert "not both" in ran.err
