"""What the ranks of a run are told. Torch-free: the worker writes it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lookalike_trainers.config import Strict


class RunImage(Strict):
    path: Path
    sha256: str
    caption: str | None = None
    name: str | None = None  # the file's as it was uploaded, for people

    @property
    def called(self) -> str:
        return self.name or self.path.name


class MoreSubject(Strict):
    """Another subject of the same run, with photos of its own."""

    class_noun: str
    images: list[RunImage] = Field(min_length=1)


class RunRequest(Strict):
    """Everything a rank needs; written by the worker as `request.json` in the run folder."""

    job_id: str
    owner: str
    concept: str
    class_noun: str
    method: str
    config: dict[str, object]
    base_name: str
    base_folder: Path
    base_fingerprint: str
    base_family: str
    prediction_type: str
    images: list[RunImage]
    also: list[MoreSubject] = Field(default=[])
    class_images: list[RunImage] = Field(default=[])  # the user's own; else the base draws them
    cache: Path
    clip_encoder: str | None = None
    dino_encoder: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_processes: int = 1
    zero_stage: int = Field(default=0, ge=0, le=3)

    @model_validator(mode="after")
    def _has_images(self) -> "RunRequest":
        if not self.images:
            raise ValueError("a run needs at least one image")
        return self
