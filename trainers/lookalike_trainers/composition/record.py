"""The record of a merged version, made of its parents'. Torch-free."""

import json
from collections.abc import Sequence
from pathlib import Path

from lookalike_platform.bases import Base
from lookalike_platform.db.tables import Job
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.compose import rules
from lookalike_registry.manifest import (
    Identity,
    Lineage,
    Manifest,
    Parent,
    Prompting,
    base_record,
    version_id,
    weights_record,
)
from lookalike_trainers.composition.request import ComposeJob


def manifest(
    job: Job,
    asked: ComposeJob,
    parents: Sequence[Manifest],
    base: Base,
    result: Path,
    attempts: int,
) -> Manifest:
    """Prompts' defaults (and evaluations) are the first subject's; `subjects` has all."""
    summary = json.loads((result / "result.json").read_text())
    weights = weights_record(result / summary["weights"])
    subjects = [subject for parent in asked.adapters for subject in parent.subjects]
    first = subjects[0]
    has = rules.strategy(asked.strategy).options
    return Manifest(
        identity=Identity(
            id=version_id(job.id),
            job_id=job.id,
            owner=job.owner,
            concept=asked.name,
            method="lora" if weights.file == WEIGHTS_NAME else rules.COMPOSITION,
        ),
        weights=weights,
        base=base_record(base),
        prompting=Prompting(
            class_noun=first.class_noun,
            trigger=first.trigger,
            phrase=first.phrase,
            subjects=subjects,
        ),
        lineage=Lineage(
            subject_set="",
            subject_set_digest="",
            images=list(dict.fromkeys(i for parent in parents for i in parent.lineage.images)),
            config={
                "strategy": asked.strategy,
                "resolution": base.resolution,
                **asked.options.model_dump(include=set(has)),
            },
            seed=asked.options.seed,
            libraries=summary["libraries"],
            world_size=1,
            zero_stage=0,
            attempts=attempts,
            parents=[
                Parent(
                    id=one.id,
                    ref=one.ref,
                    digest=one.digest,
                    method=one.method,
                    scale=one.scale,
                )
                for one in asked.adapters
            ],
        ),
    )
