from pathlib import Path

import pytest

from support_models import save_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, made once."""
    return save_base(tmp_path_factory.mktemp("base"))
