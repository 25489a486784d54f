"""``python -m lookalike_trainers.pretrain``."""

import sys

from lookalike_platform.errors import LookalikeError
from lookalike_trainers.pretrain.cli import app

try:
    app()
except LookalikeError as error:
    sys.exit(str(error))
