"""``python -m lookalike_trainers.pretrain``."""

from lookalike_trainers.pretrain.cli import app

app()
