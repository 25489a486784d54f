import os
import subprocess
import sys
import time

import pytest

from lookalike_platform.settings import Settings

MAKE = """
from lookalike_platform.settings import Settings
from lookalike_registry.mlflow_client import mlflow_client
mlflow_client(Settings())
"""


@pytest.mark.processes
def test_a_process_that_is_killed_while_it_makes_mlflows_database_leaves_none(
    settings: Settings,
) -> None:
    environment = os.environ | {"LOOKALIKE_HOME": str(settings.home)}
    making = subprocess.Popen([sys.executable, "-c", MAKE], env=environment)
    while not any(file.stat().st_size for file in settings.home.glob("mlflow-*/mlflow.db")):
        assert making.poll() is None
        time.sleep(0.01)
    making.kill()
    making.wait()
    assert not (settings.home / "mlflow.db").exists()
