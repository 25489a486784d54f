"""One database, SQLite or PostgreSQL: transactions for readers and writers, and migrations."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

_READ_ONLY = "lookalike_read_only"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 30
_MIGRATION_LOCK = 0x4C4F4F4B  # any number of our own, for pg_advisory_xact_lock


@dataclass(frozen=True)
class Database:
    """An engine, and sessions that are one transaction each: committed at the end, or rolled back.

    Rows stay readable after the commit.
    """

    engine: Engine
    _reader: Engine = field(repr=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction that may write. On SQLite it holds the one write lock: keep it short."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read_session(self) -> Iterator[Session]:
        """A transaction that only reads, and on SQLite waits for no writer."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Open the database at `url`; its tables are made by `migrate`."""
    engine = _engine(url)
    options: dict[str, Any] = {_READ_ONLY: True}
    if engine.dialect.name == "postgresql":
        options["postgresql_readonly"] = True
    return Database(engine, engine.execution_options(**options))


def migrate(url: str) -> None:
    """Bring the tables to the newest revision, in one transaction.

    Two processes may migrate at once: the second waits for the first and finds nothing to do.
    """
    # SQLite changes a table by copying it, which enforced foreign keys would turn into deletions.
    engine = _engine(url, foreign_keys=False)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                lock = text("SELECT pg_advisory_xact_lock(:lock)")
                connection.execute(lock, {"lock": _MIGRATION_LOCK})
            alembic.command.upgrade(migration_config(connection), "head")
    finally:
        engine.dispose()


def schema_revision(url: str) -> str | None:
    """The revision the database is at; None before the first migration."""
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def head_revision() -> str | None:
    """The revision that `migrate` brings a database to."""
    return ScriptDirectory(str(_MIGRATIONS)).get_current_head()


def migration_config(connection: Connection) -> alembic.config.Config:
    """Alembic's configuration for our revisions, run over `connection`."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _engine(url: str, *, foreign_keys: bool = True) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # no BEGIN of sqlite3's own; `begin` below decides
        connection.execute(f"PRAGMA busy_timeout = {1000 * _BUSY_SECONDS}")
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once when another has written
        # in between (SQLITE_BUSY_SNAPSHOT); one that takes the lock first waits its turn.
        reads = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if reads else 'OFF'}")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _use_write_ahead_log(connection: Any) -> None:
    """Readers and the writer do not wait for each other. The file remembers it.

    Two processes that open a new file at once get in each other's way here, and SQLite's
    busy_timeout does not cover this one statement.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
