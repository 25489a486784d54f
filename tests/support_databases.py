"""Databases for tests: a SQLite file, or a PostgreSQL database made for one test and dropped."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Table

POSTGRESQL = os.environ.get(
    "LOOKALIKE_TEST_POSTGRESQL", "postgresql+psycopg://postgres@127.0.0.1/test"
)


def skip_or_fail(service: str, reason: object) -> NoReturn:
    """Skip for want of a service, or fail where LOOKALIKE_DEMAND_SERVICES=1 asks for all."""
    message = f"{service} does not answer: {reason}"
    if os.environ.get("LOOKALIKE_DEMAND_SERVICES") == "1":
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def fresh_database(dialect: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database: a file in `folder`, or made on the server and dropped."""
    if dialect == "sqlite":
        yield f"sqlite:///{folder}/lookalike.db"
        return
    name = f"lookalike_{secrets.token_hex(6)}"
    server = create_engine(
        POSTGRESQL, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3}
    )
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        skip_or_fail("PostgreSQL", error)
    try:
        url = make_url(POSTGRESQL).set(database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def empty(database: Database) -> None:
    """Delete every row."""
    with database.session() as session:
        for table in reversed(Table.metadata.sorted_tables):
            session.execute(table.delete())
