"""Does prior preservation keep the class? Class images, differential output preservation, none.

    python benchmarks/prior_preservation.py SUBJECTS [--seeds 3] [--steps 150]

SUBJECTS is a folder of subjects as `lookalike dreambench` reads it. Each is learned by LoRA without
preservation, with class images (Ruiz et al. 2023) and with differential output preservation, by
every seed; everything else is equal. Runs are the worker's own (torchrun, DeepSpeed). The table has
the paper's measures with the base as the judge: PRES (pictures of the class like the subject's
photos: drift, lower is better), diversity of the class, and subject fidelity. Cells are kept in
RESULTS: a run that was stopped goes on where it was.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from lookalike_platform import bases
from lookalike_platform.files import sha256_file
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.dreambench import Subject, read_subjects
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.protocol import Contender, Protocol, run
from lookalike_trainers.evaluation.table import markdown
from lookalike_trainers.launcher import launch
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.painting import paint
from lookalike_trainers.run_request import RunImage, RunRequest

KINDS = {
    "none": {},
    "class images": {"prior": {"num_images": 32}},
    "output preservation": {"output_preservation": {"weight": 1.0}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path("prior-preservation"))
    asked = parser.parse_args()
    settings = Settings(home=asked.results)
    base = bases.resolve("pocket-64", settings)
    parts = BaseParts(base.folder, torch.device("cpu"))

    def train(contender: Contender, subject: Subject) -> Path:
        request = RunRequest(
            job_id="benchmark",
            owner="benchmark",
            concept=subject.name,
            class_noun=subject.about.class_noun,
            method=contender.method,
            config=contender.config,
            base_name=base.name,
            base_folder=base.folder,
            base_fingerprint=base.fingerprint,
            base_family=base.family,
            prediction_type=base.prediction_type,
            images=[RunImage(path=p, sha256=sha256_file(p)) for p in subject.photos],
            cache=settings.cache,
            device="cpu",
        )
        folder = Path(tempfile.mkdtemp(dir=asked.results))
        running = launch(request, folder)
        said = list(running.messages())
        if said[-1].get("outcome") != "complete":
            raise SystemExit(f"the run in {folder} did not complete: {said[-1]}")
        return next((folder / "result").glob("*.safetensors"))

    def draw(
        adapter: Path, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[list[Image.Image]]:
        take_off = wear_of("lora")(parts, adapter, 1.0, "sks")
        pictures = paint(parts, prompts, seeds, base.resolution)
        take_off()
        return pictures

    contenders = []
    for kind, changes in KINDS.items():
        for seed in range(asked.seeds):
            config = LoraConfig.model_validate(
                {"steps": asked.steps, "seed": seed, "resolution": base.resolution, **changes}
            )
            contenders.append(Contender(kind, "lora", config.model_dump(mode="json")))
    asked.results.mkdir(parents=True, exist_ok=True)
    cells = run(
        Protocol({"base": base.fingerprint}, class_images=32, prompts=asked.prompts),
        contenders,
        read_subjects(asked.subjects),
        asked.results,
        open_judges(parts, None, None),
        train,
        draw,
        lambda cell, computed: print(cell.subject, cell.contender, flush=True),
    )
    print(markdown(cells))


if __name__ == "__main__":
    main()
