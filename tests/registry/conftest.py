"""One MLflow database for all tests of the registry: making one takes seconds."""

from pathlib import Path

import pytest

from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.settings import Settings
from lookalike_registry.mlflow_client import warm


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = Settings(home=tmp_path_factory.mktemp("mlflow"))
    warm(settings).join()
    return settings.mlflow_uri


@pytest.fixture
def settings(tmp_path: Path, mlflow_uri: str) -> Settings:
    return Settings(home=tmp_path, mlflow_uri=mlflow_uri)


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)
