"""Shapes that several resources share: pages, moments, plain JSON."""

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Json = dict[str, Any]


def _moment(value: Any) -> Any:
    """Seconds since the epoch, as the tables have them, in UTC."""
    return datetime.fromtimestamp(value, UTC) if isinstance(value, float) else value


Moment = Annotated[datetime, BeforeValidator(_moment)]


class View(BaseModel):
    """An answer made from a row of the database."""

    model_config = ConfigDict(from_attributes=True, populate_by_name=True)


class Parameters(BaseModel):
    """Query parameters; a misspelt one is refused instead of being left out in silence."""

    model_config = ConfigDict(extra="forbid")


class Paging(Parameters):
    cursor: str | None = Field(default=None, pattern=r"^[\w.-]{1,80}$")
    """`next_cursor` of the page before."""
    limit: int = Field(default=50, ge=1, le=200)


class Page(BaseModel):
    next_cursor: str | None = None
    """Null on the last page."""
