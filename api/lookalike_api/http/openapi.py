"""The OpenAPI document: FastAPI's, with our problems and each method's config in it."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lookalike_api.http.problems import Problem
from lookalike_trainers.catalog import METHODS

REFS = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` give the finished document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                )
            )
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    _add(schemas, "Problem", Problem.model_json_schema(ref_template=REFS))
    for method in METHODS:
        _add(schemas, method.config.__name__, method.config.model_json_schema(ref_template=REFS))
    schemas["JobRequest"]["properties"]["config"] = {
        "title": "Config",
        "description": "the method's own options; what is left out takes its default",
        "anyOf": [{"$ref": REFS.format(model=method.config.__name__)} for method in METHODS],
        "default": {},
    }
    return document


def _add(schemas: dict[str, Any], name: str, schema: dict[str, Any]) -> None:
    """Put a model and the models inside it beside the others."""
    schemas.update(schema.pop("$defs", {}))
    schemas[name] = schema
