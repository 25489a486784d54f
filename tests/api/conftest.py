"""One API for all tests of a database's kind; each test finds it empty."""

import shutil
from collections.abc import Iterator

import pytest

from lookalike_platform.settings import Settings
from support_api import Api, serving
from support_databases import empty, fresh_database


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    with fresh_database(request.param, home) as url:
        # The reaper looks at the start only: what tests put into the tables stays as it is.
        settings = Settings(home=home, database_url=url, reap_seconds=3600)
        with serving(settings) as api:
            yield api


@pytest.fixture
def api(served: Api) -> Api:
    empty(served.context.db)
    shutil.rmtree(served.settings.home / "blobs", ignore_errors=True)
    return served
