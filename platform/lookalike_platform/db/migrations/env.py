"""Alembic's entry: runs revisions over the connection that `engine.migrate` opened."""

from alembic import context

from lookalike_platform.db.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
context.run_migrations()
