import pytest

from support_api import Api
from support_cli import Lookalike, runner


@pytest.fixture
def lookalike(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Lookalike:
    """Runs `lookalike` with the arguments given, on the API of the test."""
    monkeypatch.setenv("LOOKALIKE_URL", api.url)
    return runner(monkeypatch, capsys)
