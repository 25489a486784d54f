from pathlib import Path

import pytest

from support_models import save_base


@pytest.fixture(scope="session", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named after its family."""
    return save_base(tmp_path_factory.mktemp("bases") / request.param, request.param)
