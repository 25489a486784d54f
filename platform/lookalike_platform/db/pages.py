"""Lists in pages, newest first. A cursor is the id of the last row of the page before."""

from typing import TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from lookalike_platform.db.tables import Job, SubjectSet, UploadedImage
from lookalike_platform.errors import InvalidRequest

_Row = TypeVar("_Row", Job, SubjectSet, UploadedImage)


def page_of(
    session: Session,
    table: type[_Row],
    *wanted: ColumnElement[bool],
    prefix: str,
    cursor: str | None,
    limit: int,
) -> tuple[list[_Row], str | None]:
    """A page of the rows that are wanted, and the cursor of the next page if there is one.

    Args:
        prefix: what the table's ids begin with.

    Raises InvalidRequest for a cursor that cannot be.
    """
    query = select(table).where(*wanted)
    if cursor is not None:
        if not cursor.startswith(prefix):
            raise InvalidRequest(f"{cursor!r} is not a cursor; use next_cursor of the page before.")
        query = query.where(table.id < cursor)
    rows = list(session.scalars(query.order_by(table.id.desc()).limit(limit + 1)))
    page = rows[:limit]
    return page, page[-1].id if len(rows) > limit else None
