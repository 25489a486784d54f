"""Does prior preservation keep the class? Class images, differential output preservation, none.

    python benchmarks/prior_preservation.py SUBJECTS [--method lora] [--seeds 3] [--steps 150]

SUBJECTS is a folder of subjects as `lookalike dreambench` reads it. Each is learned without
preservation, with class images (Ruiz et al. 2023) and with differential output preservation, by
every seed; everything else is equal. Runs are the worker's own (torchrun, DeepSpeed). The table has
the paper's measures with the base as the judge: PRES (pictures of the class like the subject's
photos: drift, lower is better), diversity of the class, and subject fidelity. Cells are kept in
RESULTS: a run that was stopped goes on where it was.
"""

import argparse
from pathlib import Path

import torch
from orders import as_workers_do
from pydantic import JsonValue

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.bench import Workshop, contender
from lookalike_trainers.evaluation.dreambench import read_subjects
from lookalike_trainers.evaluation.protocol import Protocol, run
from lookalike_trainers.evaluation.table import markdown

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
    cells = run(
        Protocol(workshop.decides(), class_images=32, prompts=asked.prompts),
        contenders,
        read_subjects(asked.subjects),
        asked.results,
        workshop.judges(),
        workshop.train,
        workshop.paint,
        lambda cell, computed: print(cell.subject, cell.contender, flush=True),
    )
    print(markdown(cells))


if __name__ == "__main__":
    main()
