"""What a training begins with where its request says nothing. Torch-free.

The schemas' defaults learn a subject on the bundled base of 64 pixels. They are ten to twenty times
too fast for Stable Diffusion, so that fields may have others for large bases, which the schema
tells (`by_base`): those of the methods' own publications and of diffusers' scripts.
"""

from typing import Any

from pydantic import Field

from lookalike_platform.bases import Base

LARGE = 256
"""Pixels: the resolution from which on a base is a large one."""
KEY = "default_on_large_bases"


def by_base(default: Any, large: Any, **bounds: Any) -> Any:
    """A field with a default of its own for large bases."""
    return Field(
        default=default,
        description=f"On bases of {LARGE} pixels and more {large:g} where nothing is given.",
        json_schema_extra={KEY: large},
        **bounds,
    )


def defaults_on(base: Base, config: type[Any]) -> dict[str, Any]:
    """Of a method's config on this base, where they are not the schema's."""
    if base.resolution < LARGE:
        return {}
    extras = {name: info.json_schema_extra for name, info in config.model_fields.items()}
    return {
        name: extra[KEY]
        for name, extra in extras.items()
        if isinstance(extra, dict) and KEY in extra
    }
