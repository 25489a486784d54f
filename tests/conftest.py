"""Fixtures that every part's tests share."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from lookalike_platform.db.engine import Database, migrate, open_database
from lookalike_platform.settings import Settings
from support_databases import empty, fresh_database

# Read when torch is first imported: its threads soon sleep while they wait, as in the trainer, so
# that the processes a test starts do not slow the test itself down ten times.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, of each kind in turn."""
    with fresh_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture(scope="session")
def kept_databases(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Database]]:
    """By dialect, a migrated database that lives as long as the tests: making one takes time."""
    with ExitStack() as stack:

        @cache
        def open_kept(dialect: str) -> Database:
            folder = tmp_path_factory.mktemp("databases")
            url = stack.enter_context(fresh_database(dialect, folder))
            migrate(url)
            database = open_database(url)
            stack.callback(database.close)
            return database

        yield open_kept


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, kept_databases: Callable[[str], Database]) -> Database:
    """A migrated database with no rows, of each kind in turn."""
    database = kept_databases(request.param)
    empty(database)
    return database


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The embedded stack's settings, with everything under the test's own folder."""
    return Settings(home=tmp_path)
