"""The project's database: tables, engine, migrations."""
