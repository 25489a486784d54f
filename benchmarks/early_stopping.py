"""Early stopping by DVAR: how many steps it takes, and what of the likeness it costs.

Each subject of a folder is learned twice with the same options, once by the fixed schedule and once
with early stopping; the adapters paint the same prompts from the same noise, and the judges that
there are compare the pictures with the photos (evaluation/measures.py).

Bar, mean over the subjects: at most half the steps, at subject fidelity within 2%.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from orders import as_workers_do

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.bench import Workshop, contender
from lookalike_trainers.evaluation.dreambench import Subject, read_subjects
from lookalike_trainers.evaluation.measures import subject_fidelity
from lookalike_trainers.evaluation.protocol import Contender
from lookalike_trainers.evaluation.request import SCENES
from lookalike_trainers.evaluation.trial import read_photos

SEEDS = range(100, 108)


def main() -> None:
    as_workers_do()
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--subjects", type=Path, required=True, help="a folder of photos each")
    options.add_argument("--only", nargs="*", help="names of some of them")
    options.add_argument("--base", default="pocket-64")
    options.add_argument("--method", default="lora")
    options.add_argument("--config", type=json.loads, default={}, help="its options, as JSON")
    options.add_argument("--early", type=json.loads, default={}, help="early_stopping, as JSON")
    given = options.parse_args()
    subjects = [s for s in read_subjects(given.subjects) if not given.only or s.name in given.only]
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home))
        base = bases.resolve(given.base, settings)
        parts = BaseParts(base.folder, torch.device("cpu"), settings.cache)
        fixed = contender("fixed", given.method, given.config, base)
        options_of_early = given.config | {"early_stopping": given.early}
        early = contender("early", given.method, options_of_early, base)
        workshop = Workshop(base, parts, settings, settings.runs)
        print(f"{'subject':16} {'steps':>11} {'share':>6} {'fidelity':>15} {'ratio':>6}")
        ratios = [_compare(workshop, subject, fixed, early) for subject in subjects]
    steps, likeness = (statistics.mean(column) for column in zip(*ratios, strict=True))
    print(f"steps used / fixed schedule  {steps:.3f}  bar at most 0.500")
    print(f"subject fidelity ratio       {likeness:.3f}  bar at least 0.980")


def _compare(
    workshop: Workshop, subject: Subject, fixed: Contender, early: Contender
) -> tuple[float, float]:
    """Early stopping's share of the steps, and of the likeness."""
    (all_steps, best), (steps, found) = (
        _learn(workshop, subject, contender) for contender in (fixed, early)
    )
    print(
        f"{subject.name:16} {steps:5} /{all_steps:4} {steps / all_steps:6.2f} "
        f"{found:7.4f}/{best:7.4f} {found / best:6.3f}",
        flush=True,
    )
    return steps / all_steps, found / best


def _learn(workshop: Workshop, subject: Subject, contender: Contender) -> tuple[int, float]:
    """Steps taken, and the likeness of what the adapter paints."""
    adapter = workshop.train(contender, subject)
    steps = len((adapter.parent / "metrics.jsonl").read_text().splitlines())
    called = contender.calls.format(class_noun=subject.about.class_noun)
    prompts = [scene.format(subject=called) for scene in SCENES]
    rows = workshop.paint(contender, adapter, prompts, SEEDS)
    judge = workshop.judges().subject[0]
    pictures = judge.encode_images([picture for row in rows for picture in row])
    photos = judge.encode_images(read_photos(subject.photos))
    return steps, float(subject_fidelity(pictures, photos).mean())


if __name__ == "__main__":
    main()
