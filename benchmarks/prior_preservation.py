"""Does prior preservation keep the class? Class images, differential output preservation, none.

    python benchmarks/prior_preservation.py SUBJECTS [--method lora] [--seeds 3] [--steps 150]

SUBJECTS is a folder of subjects as `lookalike dreambench` reads it. Each is learned without
preservation, with class images (Ruiz et al. 2023) and with differential output preservation, by
every seed; everything else is equal. Runs are the worker's own (torchrun, DeepSpeed). The table has
the paper's measures with the base as the judge, means over the seeds and their range: PRES
(pictures of the class like the subject's photos: drift, lower is better), diversity of the class,
and subject fidelity; and of the base before any training what there is of them. Pictures of the
class begin at noise from which no class image was drawn. Cells are kept in RESULTS: a run that was
stopped goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from orders import as_workers_do
from pydantic import JsonValue

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.bench import Workshop, contender
from lookalike_trainers.evaluation.dreambench import Subject, read_subjects
from lookalike_trainers.evaluation.measures import diversity, prior_drift
from lookalike_trainers.evaluation.protocol import Cell, Protocol, run
from lookalike_trainers.evaluation.request import CLASS_SEED
from lookalike_trainers.evaluation.trial import read_photos
from lookalike_trainers.painting import paint

CLASS_IMAGES = 32
MEASURES = ("prior_drift", "class_diversity", "subject_fidelity")
KINDS: dict[str, dict[str, JsonValue]] = {
    "none": {},
    "class images": {"prior": {"num_images": 32}},
    "output preservation": {"output_preservation": {"weight": 1.0}},
}


def main() -> None:
    as_workers_do()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", type=Path)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path("prior-preservation"))
    asked = parser.parse_args()
    settings = Settings(home=asked.results)
    base = bases.resolve("pocket-64", settings)
    parts = BaseParts(base.folder, torch.device("cpu"), settings.cache)
    workshop = Workshop(base, parts, settings, settings.runs)
    contenders = [
        contender(kind, asked.method, {"steps": asked.steps, "seed": seed, **options}, base)
        for kind, options in KINDS.items()
        for seed in range(asked.seeds)
    ]
    subjects = read_subjects(asked.subjects)
    cells = run(
        Protocol(workshop.decides(), class_images=CLASS_IMAGES, prompts=asked.prompts),
        contenders,
        subjects,
        asked.results,
        workshop.judges(),
        workshop.train,
        workshop.paint,
        lambda cell, computed: print(cell.subject, cell.contender, flush=True),
    )
    print("| subject | kept by | drift (PRES) | diversity of the class | subject fidelity |")
    print("| --- | --- | --- | --- | --- |")
    for subject in subjects:
        before = " | ".join(_before(subject, workshop, base.resolution))
        print(f"| {subject.name} | before training | {before} | |")
        for kind in KINDS:
            own = [c for c in cells if (c.subject, c.contender) == (subject.name, kind)]
            print(f"| | {kind} | {' | '.join(_over_seeds(own, name) for name in MEASURES)} |")


def _before(subject: Subject, workshop: Workshop, resolution: int) -> list[str]:
    """Drift and diversity of the class as the base alone paints it."""
    judge = workshop.judges().subject[0]
    seeds = range(CLASS_SEED, CLASS_SEED + CLASS_IMAGES)
    prompt = f"a {subject.about.class_noun}"
    (pictures,) = paint(workshop.parts, [prompt], seeds, resolution)
    of_class = judge.encode_images(pictures)
    drift = prior_drift(of_class, judge.encode_images(read_photos(subject.photos)))
    return [f"{float(drift.mean()):.3f}", f"{diversity(of_class):.3f}"]


def _over_seeds(cells: Sequence[Cell], measure: str) -> str:
    """Mean and range of the seeds' means."""
    means = [fmean(next(iter(getattr(cell.scores, measure).values()))) for cell in cells]
    return f"{fmean(means):.3f} ({min(means):.3f}–{max(means):.3f})"


if __name__ == "__main__":
    main()
