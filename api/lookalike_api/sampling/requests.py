"""What a generation may ask for, and what is kept of it once every reference is pinned."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lookalike_platform.samplers import SAMPLERS

MAX_SIDE = 2048
MAX_PIXELS = 2**24  # of all pictures of a request together
MAX_IMAGES = 16
MAX_ADAPTERS = 8
MAX_REGIONS = 12
MAX_SEED = 2**32 - 1
STRENGTH = 0.8  # of image-to-image where none is given, and of inpainting
MASK_STRENGTH = 1.0
IMAGE_ID = r"^img_[0-9a-z]{1,40}$"


Compose = Literal["attention", "latents"]


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


class Region(Strict):
    """A place in the pictures with a prompt and adapters of its own, which act there alone."""

    prompt: str = Field(min_length=1)
    adapters: list[AdapterUse] = Field(default=[], max_length=MAX_ADAPTERS)
    box: list[float] | None = Field(default=None, min_length=4, max_length=4)
    """Left, top, right and bottom as shares of the picture: [0, 0, 0.5, 1] is its left half."""
    mask_image: str | None = Field(default=None, pattern=IMAGE_ID)
    """In place of a box: an uploaded image, white where the region is."""

    @field_validator("box")
    @classmethod
    def _within(cls, box: list[float] | None) -> list[float] | None:
        if box is not None:
            left, top, right, bottom = box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    "give left, top, right and bottom as shares from 0 to 1, left before right and "
                    "top before bottom: [0, 0, 0.5, 1]"
                )
        return box

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.box is None) == (self.mask_image is None):
            raise ValueError("say where the region is: give either box or mask_image")
        return self

    @property
    def sides(self) -> tuple[float, float, float, float] | None:
        if self.box is None:
            return None
        left, top, right, bottom = self.box
        return left, top, right, bottom


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
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """How far guided predictions are brought back to the spread of unguided ones: 0 is not."""
    guidance_interval: list[float] = Field(default=[0.0, 1.0], min_length=2, max_length=2)
    """From and until which share of the way from noise to picture to guide."""
    dynamic_threshold: float | None = Field(default=None, gt=0, le=1)
    """Percentile at which the picture that a prediction means is clipped; .995 is Imagen's."""
    steps: int = Field(default=25, ge=1, le=500)
    sampler: Annotated[str, Field(json_schema_extra={"enum": list(SAMPLERS)})] = "dpmsolver++"
    eta: float = Field(default=0.0, ge=0, le=1)
    """Of DDIM: the share of DDPM's noise that it adds after each step."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Of the first picture; the next ones count on from it. Left out: drawn, and returned."""
    width: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Left out: as the base was trained, or in the proportions of `init_image`."""
    num_images: int = Field(default=1, ge=1, le=MAX_IMAGES)
    deterministic: bool = False
    """The same pixels each time on the same machine, in a batch of its own: it takes longer. Else
    pictures may differ in the last bit by what is painted beside them."""
    deadline_seconds: float | None = Field(default=None, gt=0, le=86400)
    """Not begun within this time it fails instead of waiting on."""
    init_image: str | None = Field(default=None, pattern=IMAGE_ID)
    """An uploaded image to start from (`POST /v1/images`)."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """The share of the steps that are made, the more the less is left of `init_image`. Left out:
    0.8, or 1 with a mask."""
    mask_image: str | None = Field(default=None, pattern=IMAGE_ID)
    """An uploaded image, white where to paint and black where `init_image` stays."""
    regions: list[Region] = Field(default=[], max_length=MAX_REGIONS)
    """Later ones lie over earlier ones. `prompt` and `adapters` are for what none covers."""
    compose: Compose = "attention"
    """How regions come together: in the cross-attention (Mix-of-Show), or as latents painted for
    each apart (MultiDiffusion), which takes longer and any adapters."""

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: list[float]) -> list[float]:
        begin, end = interval
        if not 0 <= begin < end <= 1:
            raise ValueError("give two shares from 0 to 1, the smaller first: [0.2, 0.8]")
        return interval


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


class PinnedImage(BaseModel):
    """An uploaded image; `sha256` is its blob's."""

    id: str
    sha256: str


class PinnedRegion(BaseModel):
    """A region with its references pinned."""

    prompt: str
    bound_prompt: str
    adapters: list[PinnedAdapter]
    box: tuple[float, float, float, float] | None = None
    mask_image: PinnedImage | None = None
    bound_negative: str | None = None
    """The request's negative prompt as this region's adapters know it. Older jobs have none."""


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
    deterministic: bool = False
    deadline_seconds: float | None = None
    warnings: list[str]
    # Jobs of before these were asked for have none of them.
    bound_negative: str | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    dynamic_threshold: float | None = None
    eta: float = 0.0
    init_image: PinnedImage | None = None
    strength: float | None = None
    mask_image: PinnedImage | None = None
    regions: list[PinnedRegion] = []
    compose: Compose = "attention"

    @property
    def images(self) -> list[PinnedImage]:
        """All uploads that it needs."""
        regional = [region.mask_image for region in self.regions]
        return [image for image in (self.init_image, self.mask_image, *regional) if image]

    def parameters(self, number: int, base_fingerprint: str) -> str:
        """JSON for picture `number`; its "request", sent to the API, makes that picture again."""
        request = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "adapters": _uses(self.adapters),
            "base": self.base,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": self.guidance_interval,
            "dynamic_threshold": self.dynamic_threshold,
            "steps": self.steps,
            "sampler": self.sampler,
            "eta": self.eta,
            "seed": self.seed + number,
            "width": self.width,
            "height": self.height,
            "num_images": 1,
            "deterministic": self.deterministic,
            "init_image": self.init_image and self.init_image.id,
            "strength": self.strength,
            "mask_image": self.mask_image and self.mask_image.id,
            "regions": [
                {
                    "prompt": region.prompt,
                    "adapters": _uses(region.adapters),
                    "box": region.box,
                    "mask_image": region.mask_image and region.mask_image.id,
                }
                for region in self.regions
            ],
            "compose": self.compose,
        }
        used = [*self.adapters, *(a for region in self.regions for a in region.adapters)]
        return json.dumps(
            {
                "request": request,
                "bound_prompt": self.bound_prompt,
                "bound_region_prompts": [region.bound_prompt for region in self.regions],
                "versions": [{"ref": a.ref, "digest": a.digest} for a in used],
                "images": [image.model_dump() for image in self.images],
                "base_fingerprint": base_fingerprint,
            }
        )


def _uses(adapters: list[PinnedAdapter]) -> list[dict[str, Any]]:
    return [{"ref": adapter.ref, "scale": adapter.scale} for adapter in adapters]
