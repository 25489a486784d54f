"""What there is to choose from: base models, methods, samplers."""

from fastapi import APIRouter
from pydantic import BaseModel

from lookalike_api.http.context import Lookalike
from lookalike_api.http.shapes import Json
from lookalike_api.sampling.sizes import side_multiple
from lookalike_platform import bases
from lookalike_platform.samplers import SAMPLERS
from lookalike_trainers.catalog import METHODS

router = APIRouter(prefix="/v1", tags=["catalog"])


class BaseModelView(BaseModel):
    """A base model that is here. Width and height of pictures are multiples of `side_multiple`."""

    name: str
    family: str
    fingerprint: str
    resolution: int
    side_multiple: int
    max_tokens: int
    default: bool


class BaseModels(BaseModel):
    items: list[BaseModelView]


class MethodView(BaseModel):
    """A way to learn a subject. `config`: JSON schema of a job's config."""

    name: str
    summary: str
    config: Json


class Methods(BaseModel):
    items: list[MethodView]


class SamplerView(BaseModel):
    """A sampler by its name here, and the class behind it, diffusers' or ours; null is the base's
    own."""

    name: str
    scheduler: str | None
    options: Json


class Samplers(BaseModel):
    items: list[SamplerView]


@router.get("/base-models")
def list_base_models(context: Lookalike) -> BaseModels:
    """The bundled base models and the default one. Jobs also take a hub id that is in the hub's
    local cache, or a folder in diffusers layout."""
    default = context.settings.default_base
    return BaseModels(
        items=[
            BaseModelView(
                name=base.name,
                family=base.family,
                fingerprint=base.fingerprint,
                resolution=base.resolution,
                side_multiple=side_multiple(base),
                max_tokens=base.max_tokens,
                default=base.name == default,
            )
            for base in (
                bases.resolve(name, context.settings)
                for name in dict.fromkeys([default, *bases.bundled()])
            )
        ]
    )


@router.get("/methods")
def list_methods() -> Methods:
    """The training methods, with the schema of their configs and its defaults."""
    return Methods(
        items=[
            MethodView(
                name=method.name, summary=method.summary, config=method.config.model_json_schema()
            )
            for method in METHODS
        ]
    )


@router.get("/samplers")
def list_samplers() -> Samplers:
    """The samplers a generation may name."""
    return Samplers(
        items=[
            SamplerView(name=name, scheduler=scheduler, options=options)
            for name, (scheduler, options) in SAMPLERS.items()
        ]
    )
