"""Adapters merged, in memory and as files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lookalike_platform.files import sha256_file
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.check import check_file
from lookalike_registry.compose import rules
from lookalike_registry.manifest import SubjectRecord
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.merging import merge
from lookalike_trainers.composition.request import CompositionRequest, MergeOptions, ParentFile
from lookalike_trainers.methods.composition import Change, load, save
from support_methods import CARD, CPU
from support_models import RESOLUTION
from support_pairs import Adapter, trained_adapter

Maker = Callable[[str, int], Adapter]
"""The first (0) or the second adapter of a kind, made once."""
COMPOSITIONS = {
    "ungated": ("custom_diffusion", "lora"),
    "gated": ("custom_diffusion", "lora", "perfusion"),
    "gated_whole": ("dreambooth", "perfusion"),
}
"""Kinds of merged versions by what is in them."""


def trained_or_merged(base: Path, folder: Path, kind: str, number: int) -> Adapter:
    """As `trained_adapter`, with COMPOSITIONS."""
    if kind not in COMPOSITIONS:
        return trained_adapter(base, folder, kind, number)
    own = folder / f"{kind}-{number}"
    own.mkdir()
    parents = [trained_adapter(base, own, one, number) for one in COMPOSITIONS[kind]]
    whole = [(*parent[:3], f"w{place}") for place, parent in enumerate(parents)]
    method, file, _, _ = saved(asked(base, "weighted_sum", whole), own)
    _, _, scale, word = parents[0]
    return method, file, scale, word


def parent_file(method: str, file: Path, scale: float, *subjects: SubjectRecord) -> ParentFile:
    """As it was registered."""
    digest = sha256_file(file)
    return ParentFile(
        ref=f"{subjects[0].name}@1",
        digest=digest,
        method=method,
        file=file,
        scale=scale,
        subjects=list(subjects),
    )


def asked(base: Path, strategy: str, adapters: list[Adapter], **options: Any) -> CompositionRequest:
    parents = []
    for method, file, scale, word in adapters:
        learned = method != "dreambooth" and file.name != WEIGHTS_NAME
        subject = SubjectRecord(
            name=word, trigger=word, class_noun="dog", phrase="{trigger}", learned=learned
        )
        count = len(load(file).subjects) if method == rules.COMPOSITION else 1
        parents.append(parent_file(method, file, scale, *[subject] * count))
    return CompositionRequest(
        name="duo",
        strategy=strategy,
        options=MergeOptions(**options),
        parents=parents,
        base_folder=base,
        family="sd1",
        prediction_type="epsilon",
        resolution=RESOLUTION,
        cache=base,
        device="cpu",
    )


def merged(request: CompositionRequest) -> Change:
    return merge(request, BaseParts(request.base_folder, CPU), lambda done, total: None)


def saved(request: CompositionRequest, folder: Path) -> Adapter:
    """The merged file, at scale 1, whose subjects answer to kim and kim-2."""
    file = save(merged(request), folder, CARD)
    check_file(file, request.base_folder)
    if file.name == WEIGHTS_NAME:
        return ("lora", file, 1.0, "kim")
    return (rules.COMPOSITION, file, 1.0, "kim")
