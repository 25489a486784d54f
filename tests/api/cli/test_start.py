"""The command line before any command has run."""

import subprocess
import sys
from pathlib import Path

import pytest

from lookalike_api.cli.settings import read_settings
from lookalike_platform.errors import InvalidRequest, LookalikeError
from lookalike_platform.settings import get_settings

HEAVY = ["torch", "mlflow", "diffusers", "celery", "fastapi", "sqlalchemy", "PIL", "numpy"]


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
import lookalike_api.cli.main
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_a_wrong_setting_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    get_settings.cache_clear()
    monkeypatch.setenv("LOOKALIKE_API_PORT", "many")
    with pytest.raises(InvalidRequest) as refused:
        read_settings()
    assert [problem.path for problem in refused.value.fields] == ["LOOKALIKE_API_PORT"]


def test_a_home_that_cannot_be_made_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    get_settings.cache_clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOOKALIKE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(LookalikeError, match="LOOKALIKE_HOME"):
        read_settings()
