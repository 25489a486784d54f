from functools import cache, partial
from pathlib import Path

import pytest

from support_merging import Maker
from support_models import save_base
from support_pairs import trained_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return cache(partial(trained_adapter, base, tmp_path_factory.mktemp("adapters")))
