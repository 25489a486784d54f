"""What a merge may ask for, and what its process is told. Torch-free: the API imports it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lookalike_registry.manifest import SubjectRecord

MAX_PARENTS = 12


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MergeOptions(Strict):
    """Which of them a strategy has: rules.STRATEGIES.

    rank: of the merged products. Left out: the largest of the parents' in `svd`, the sum of them
        in `ties` and `dare_linear`, which leave a change that has no rank as it is.
    density: the part of each change's entries that stays.
    seed: of the noise that subjects are observed in, or of what is dropped.
    """

    rank: int | None = Field(default=None, ge=1, le=1024)
    density: float = Field(default=0.5, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


class PinnedParent(Strict):
    """A version to merge, as the request meant it when it was accepted."""

    id: str
    ref: str
    digest: str
    method: str
    scale: float
    subjects: list[SubjectRecord]


class ComposeJob(Strict):
    """A compose job's `request`. `options`: those that the strategy has."""

    name: str
    strategy: str
    options: MergeOptions
    adapters: list[PinnedParent] = Field(min_length=2, max_length=MAX_PARENTS)


class ParentFile(BaseModel):
    """One adapter to merge, as the process finds it. digest: sha256 of what was registered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str
    digest: str
    method: str
    file: Path
    scale: float
    subjects: list[SubjectRecord]


class CompositionRequest(BaseModel):
    """Everything the process needs; written by the worker as `request.json` in the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    strategy: str
    options: MergeOptions
    parents: list[ParentFile]
    base_folder: Path
    family: str
    prediction_type: str
    resolution: int
    cache: Path
    device: Literal["auto", "cpu", "cuda"]
