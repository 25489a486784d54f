"""What an evaluation may ask for, and what its process is told. Torch-free: the API imports it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

SCENES = (
    "a {subject}",
    "a {subject} on a green background",
    "a {subject} on the beach",
    "a {subject} in the snow",
)
"""What every finished training is tried on, and every evaluation that names no prompts."""

MAX_PICTURES = 512

CLASS_SEED = 2**31
"""Seeds of the class's pictures begin here: a run with prior preservation has learned from what
the same sampler made of the same prompt and small seeds."""


def _with_subject(template: str) -> str:
    if template.count("{subject}") != 1 or set("{}") & set(template.replace("{subject}", "")):
        raise ValueError("write {subject} in it once, and no other braces")
    return template


Template = Annotated[str, StringConstraints(max_length=500), AfterValidator(_with_subject)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EvaluationOptions(Strict):
    """How an adapter is tried.

    prompts: `{subject}` in each stands for the trigger and the class noun.
    images_per_prompt: the seeds are `seed`, `seed + 1`, …; two or more show diversity.
    class_images: pictures for the class noun alone, which show what the adapter did to its class.
    """

    prompts: list[Template] = Field(default=list(SCENES), min_length=1, max_length=100)
    images_per_prompt: int = Field(default=2, ge=1, le=16)
    class_images: int = Field(default=4, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @property
    def seeds(self) -> range:
        """Of each prompt's pictures."""
        return range(self.seed, self.seed + self.images_per_prompt)

    @property
    def class_seeds(self) -> range:
        first = CLASS_SEED + self.seed
        return range(first, first + self.class_images)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        pictures = len(self.prompts) * self.images_per_prompt + self.class_images
        if pictures > MAX_PICTURES:
            raise ValueError(f"{pictures} pictures are more than {MAX_PICTURES}: ask for fewer")
        return self


class Pinned(Strict):
    """The version that is evaluated, as the request meant it when it was accepted."""

    id: str
    ref: str
    digest: str


class EvaluateJob(Strict):
    """An evaluate job's `request`. `called`: how prompts speak of the subject, "sks dog"."""

    adapters: list[Pinned] = Field(min_length=1, max_length=1)
    method: str
    trigger: str
    called: str
    class_noun: str
    resolution: int
    options: EvaluationOptions


class EvaluationRequest(BaseModel):
    """Everything the process needs; written by the worker as `request.json` in the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    adapter: Path
    trigger: str
    called: str
    class_noun: str
    resolution: int
    base_folder: Path
    photos: list[Path] = Field(min_length=1)
    options: EvaluationOptions
    clip_encoder: str | None
    dino_encoder: str | None
    cache: Path
    device: Literal["auto", "cpu", "cuda"]
