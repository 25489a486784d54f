"""A finished training's own evaluation: the grid, and figures of what is in it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.manifest import Evaluation
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.base_features import BaseFeatures
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.finished import try_out
from lookalike_trainers.evaluation.measures import cosines, diversity
from lookalike_trainers.evaluation.request import EvaluationOptions
from lookalike_trainers.evaluation.scores import record, score
from lookalike_trainers.evaluation.trial import read_photos, try_on
from lookalike_trainers.method_configs import LoraConfig
from support_images import photo
from support_models import save_base
from support_ranks import run_request
from support_sampling import LIBRARY_WARNINGS, save_adapter

pytestmark = LIBRARY_WARNINGS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    for name in ("photos", "result"):
        (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(photo(number))
    save_adapter(tmp_path / "result" / WEIGHTS_NAME, tmp_path / "base")
    return tmp_path


def test_the_figures_are_those_of_the_pictures_in_the_grid_judged_by_the_bare_base(
    folder: Path,
) -> None:
    config = LoraConfig(resolution=64, rank=4)
    grid, figures = try_out(
        run_request(folder, config),
        config,
        folder / "result" / WEIGHTS_NAME,
        torch.device("cpu"),
    )
    with Image.open(grid) as sheet:
        assert sheet.width == 4 * 64

    encoder = BaseFeatures(BaseParts(folder / "base", torch.device("cpu")))
    singles = sorted((folder / "result" / "samples").glob("adapter-*.png"))
    painted = encoder.encode_images(read_photos(singles))
    photos = sorted((folder / "photos").iterdir())
    real = encoder.encode_images(read_photos(photos))
    kept = record(figures)
    assert kept["subject_fidelity"] == pytest.approx(float(cosines(painted, real).mean()), abs=1e-5)
    pairs = [diversity(painted[row : row + 2]) for row in range(0, 8, 2)]
    assert kept["subject_diversity"] == pytest.approx(sum(pairs) / 4, abs=1e-5)
    assert (kept["subject_judge"], kept["prompt_judge"]) == ("base-features", "base-classifier-2")
    assert Evaluation(**kept).prior_drift == kept["prior_drift"]


def test_a_single_prompt_is_judged_among_other_scenes_of_the_class(folder: Path) -> None:
    """Among itself alone it would have every picture shown perfectly."""
    parts = BaseParts(folder / "base", torch.device("cpu"))
    options = EvaluationOptions(prompts=["a {subject}"], images_per_prompt=1, class_images=1)
    adapter = folder / "result" / WEIGHTS_NAME
    painted = try_on(parts, "lora", adapter, "sks", "sks dog", "dog", 64, options)
    scores = score(open_judges(parts, None, None), painted.of_class, painted)
    ((shown,),) = scores.prompt_fidelity.values()
    assert 0 < shown < 1
