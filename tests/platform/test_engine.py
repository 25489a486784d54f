import subprocess
import sys
import threading

import alembic.command
import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from lookalike_platform.db.engine import (
    Database,
    migrate,
    migration_config,
    open_database,
    schema_revision,
)
from lookalike_platform.db.tables import AdapterAlias, Table

NEWEST = "0002"
"""The last revision."""


def alias(version: int, name: str = "candidate") -> AdapterAlias:
    return AdapterAlias(owner="local", concept="dog", alias=name, version=version)


def test_migrating_makes_the_tables_and_once_is_enough(database_url: str) -> None:
    assert schema_revision(database_url) is None
    migrate(database_url)
    migrate(database_url)
    assert schema_revision(database_url) == NEWEST
    database = open_database(database_url)
    names = set(inspect(database.engine).get_table_names())
    database.close()
    assert names == {*Table.metadata.tables, "alembic_version"}


def test_the_revisions_lead_to_the_tables_of_the_code(database: Database) -> None:
    with database.engine.begin() as connection:
        alembic.command.check(migration_config(connection))


def test_a_database_can_be_taken_back_to_nothing(database_url: str) -> None:
    migrate(database_url)
    database = open_database(database_url)
    with database.engine.begin() as connection:
        alembic.command.downgrade(migration_config(connection), "base")
    assert schema_revision(database_url) is None
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    database.close()


def test_two_processes_may_migrate_at_once(database_url: str) -> None:
    program = "import sys; from lookalike_platform.db.engine import migrate; migrate(sys.argv[1])"
    started = [
        subprocess.Popen([sys.executable, "-c", program, database_url], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert schema_revision(database_url) == NEWEST


def test_a_session_commits_all_or_nothing(database: Database) -> None:
    def add_and_break_off() -> None:
        with database.session() as session:
            session.add(alias(1))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_break_off()
    with database.session() as session:
        kept = alias(2)
        session.add(kept)
    assert kept.version == 2
    with database.read_session() as session:
        assert [row.version for row in session.query(AdapterAlias)] == [2]


def test_a_read_session_cannot_write(database: Database) -> None:
    insert = "INSERT INTO adapter_aliases VALUES ('local', 'dog', 'candidate', 1)"
    with database.read_session() as session, pytest.raises(DBAPIError, match=r"read-?only"):
        session.execute(text(insert))
    with database.session() as session:
        session.add(alias(1))


def test_writers_that_read_first_wait_for_each_other(database: Database) -> None:
    """Forty increments by read and write, none lost and none refused as locked."""
    with database.session() as session:
        session.add(alias(0))

    def increment() -> None:
        for _ in range(10):
            with database.session() as session:
                row = session.get_one(
                    AdapterAlias, ("local", "dog", "candidate"), with_for_update=True
                )
                row.version += 1

    threads = [threading.Thread(target=increment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read_session() as session:
        assert session.query(AdapterAlias).one().version == 40


def test_references_are_enforced(database: Database) -> None:
    orphan = "INSERT INTO outbox (job_id, queue, created_at) VALUES ('job_0', 'train', 0)"
    with pytest.raises(IntegrityError), database.session() as session:
        session.execute(text(orphan))
