"""What a generation may ask for, and what is kept of it once every reference is pinned."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lookalike_platform.samplers import SAMPLERS

MAX_SIDE = 2048
MAX_PIXELS = 2**24  # of all pictures of a request together
MAX_IMAGES = 16
MAX_ADAPTERS = 8
MAX_SEED = 2**32 - 1


class Strict(BaseModel):
    """JSON taken by its word: no unknown keys, no "20" for 20, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AdapterUse(Strict):
    """An adapter and its weight in the sum W' = W + sum of scale * (alpha / rank) B A.

    `ref` names a version (`rex@3`), an alias (`rex@candidate`) or an adapter (`rex`: its
    `production` version, else its `candidate`). {"name": "rex", "version": 3} and
    {"name": "rex", "alias": "candidate"} say the same.
    """

    ref: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*(@[\w.-]+)?$", max_length=200, examples=["rex@candidate"]
    )
    scale: float = Field(default=1.0, ge=-4, le=4)

    @model_validator(mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "name" not in value or "ref" in value:
            return value
        rest = {k: v for k, v in value.items() if k not in ("name", "version", "alias")}
        labels = [str(value[k]) for k in ("version", "alias") if k in value]
        return {"ref": "@".join([str(value["name"]), *labels]), **rest}


class GenerationRequest(Strict):
    """Pictures to make. `<rex>` in the prompt stands for the subject that adapter rex learned."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "<rex> on the moon",
                    "adapters": [{"ref": "rex@candidate", "scale": 0.9}],
                    "guidance_scale": 4.0,
                    "steps": 25,
                    "sampler": "dpmsolver++",
                    "seed": 7,
                    "num_images": 4,
                }
            ]
        }
    )

    prompt: str = Field(min_length=1)
    negative_prompt: str = ""
    adapters: list[AdapterUse] = Field(default=[], max_length=MAX_ADAPTERS)
    base: str | None = Field(default=None, min_length=1, max_length=500)
    """Left out: the adapters' base, or the installation's default."""
    guidance_scale: float = Field(default=4.0, ge=1, le=50)
    """Classifier-free guidance, as diffusers counts it: 1 is none."""
    steps: int = Field(default=25, ge=1, le=500)
    sampler: Annotated[str, Field(json_schema_extra={"enum": list(SAMPLERS)})] = "dpmsolver++"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Of the first picture; the next ones count on from it. Left out: drawn, and returned."""
    width: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    num_images: int = Field(default=1, ge=1, le=MAX_IMAGES)


class PinnedAdapter(BaseModel):
    """The version an adapter reference meant when the request was accepted."""

    id: str
    asked: str
    ref: str
    name: str
    version: int
    digest: str
    scale: float
    word: str = ""
    """Stands in the bound prompt for the tokens the version learned, if it learned any."""


class GenerateJob(BaseModel):
    """A generate job's `request`: everything decided, so that it can be repeated exactly."""

    prompt: str
    bound_prompt: str
    negative_prompt: str
    adapters: list[PinnedAdapter]
    base: str
    guidance_scale: float
    steps: int
    sampler: str
    seed: int
    width: int
    height: int
    num_images: int
    warnings: list[str]

    def parameters(self, number: int, base_fingerprint: str) -> str:
        """JSON for picture `number`; its "request", sent to the API, makes that picture again."""
        request = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "adapters": [{"ref": a.ref, "scale": a.scale} for a in self.adapters],
            "base": self.base,
            "guidance_scale": self.guidance_scale,
            "steps": self.steps,
            "sampler": self.sampler,
            "seed": self.seed + number,
            "width": self.width,
            "height": self.height,
            "num_images": 1,
        }
        return json.dumps(
            {
                "request": request,
                "bound_prompt": self.bound_prompt,
                "versions": [{"ref": a.ref, "digest": a.digest} for a in self.adapters],
                "base_fingerprint": base_fingerprint,
            }
        )
