import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import CapabilityMissing, Conflict, InvalidRequest
from lookalike_platform.files import sha256_file
from lookalike_platform.ids import new_id
from lookalike_platform.settings import Settings
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.manifest import Manifest
from lookalike_registry.mlflow_client import mlflow_client
from lookalike_registry.register import GRID_NAME, STEPS, register
from lookalike_registry.versions import aliases
from support_registry import METRICS, finished_run, manifest_of

# MLflow's own tables, with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


class Crash(BaseException):
    """Not an Exception, so that nothing on the way can catch it."""


def crash_after(step: str) -> Callable[[str], None]:
    def on_step(done: str) -> None:
        if done == step:
            raise Crash

    return on_step


@pytest.fixture
def concept() -> str:
    """A concept no other test uses: all share one MLflow."""
    return new_id("teapot").replace("_", "-")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return finished_run(tmp_path / "run")


def mlflow_versions(settings: Settings, concept: str) -> list[Any]:
    client = mlflow_client(settings)
    found = client.search_model_versions(f"name = 'local.{concept}'")
    return [client.get_model_version(version.name, version.version) for version in found]


def test_a_run_becomes_version_1_with_the_alias_candidate(
    database: Database,
    blobs: BlobStore,
    settings: Settings,
    files: dict[str, Path],
    concept: str,
    tmp_path: Path,
) -> None:
    manifest = manifest_of(files, new_id("job"), concept=concept)
    steps: list[str] = []
    version = register(database, blobs, settings, manifest, files, METRICS, steps.append)

    assert tuple(steps) == STEPS
    assert (version.version, version.mlflow_version) == (1, "1")
    assert version.mlflow_model == f"local.{concept}"
    assert blobs.get(version.digest) == files[WEIGHTS_NAME].read_bytes()
    assert Manifest.model_validate(version.manifest) == manifest
    with database.session() as session:
        assert aliases(session, "local", concept) == {"candidate": 1}

    client = mlflow_client(settings)
    mirrored = client.get_model_version_by_alias(version.mlflow_model, "candidate")
    assert mirrored.tags == manifest.to_tags()
    run = client.get_run(mirrored.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["targets"] == '["to_q"]'
    losses = client.get_metric_history(mirrored.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    kept = Path(client.download_artifacts(mirrored.run_id, "adapter", str(tmp_path)))
    assert sha256_file(kept / WEIGHTS_NAME) == version.digest
    assert (kept / GRID_NAME).read_bytes() == files[GRID_NAME].read_bytes()
    assert json.loads((kept / "manifest.json").read_text()) == version.manifest


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_after_any_step_and_a_retry_give_exactly_one_version(
    database: Database,
    blobs: BlobStore,
    settings: Settings,
    files: dict[str, Path],
    concept: str,
    step: str,
) -> None:
    manifest = manifest_of(files, new_id("job"), concept=concept)
    with pytest.raises(Crash):
        register(database, blobs, settings, manifest, files, METRICS, crash_after(step))
    version = register(database, blobs, settings, manifest, files, METRICS)

    assert version.version == 1
    (mirrored,) = mlflow_versions(settings, concept)
    assert (int(mirrored.version), mirrored.aliases) == (1, ["candidate"])
    client = mlflow_client(settings)
    runs = client.search_runs(
        [client.get_experiment_by_name("lookalike").experiment_id],
        f"tags.`lookalike.job_id` = '{manifest.identity.job_id}'",
    )
    assert [run.info.run_id for run in runs] == [version.mlflow_run_id]
    assert len(client.get_metric_history(version.mlflow_run_id, "loss")) == len(METRICS)
    with database.session() as session:
        assert len(session.scalars(select(AdapterVersion)).all()) == 1


def test_a_retry_with_newly_trained_weights_replaces_those_of_the_crashed_try(
    database: Database, blobs: BlobStore, settings: Settings, tmp_path: Path, concept: str
) -> None:
    job_id = new_id("job")
    files = finished_run(tmp_path / "first", 1)
    manifest = manifest_of(files, job_id, concept=concept)
    with pytest.raises(Crash):
        register(database, blobs, settings, manifest, files, METRICS, crash_after("version"))
    files = finished_run(tmp_path / "second", 2)
    manifest = manifest_of(files, job_id, concept=concept, world_size=2)
    version = register(database, blobs, settings, manifest, files, METRICS)

    assert version.digest == sha256_file(files[WEIGHTS_NAME])
    (mirrored,) = mlflow_versions(settings, concept)
    assert mirrored.tags == manifest.to_tags()
    client = mlflow_client(settings)
    path = client.download_artifacts(version.mlflow_run_id, f"adapter/{WEIGHTS_NAME}")
    assert sha256_file(Path(path)) == version.digest


def test_jobs_of_one_concept_registered_at_once_get_1_and_2(
    database: Database, blobs: BlobStore, settings: Settings, tmp_path: Path, concept: str
) -> None:
    start = Barrier(2, timeout=60)  # so that one who fails does not hold the other for ever

    def run(seed: int) -> AdapterVersion:
        files = finished_run(tmp_path / str(seed), seed)
        manifest = manifest_of(files, new_id("job"), concept=concept)
        start.wait()
        return register(database, blobs, settings, manifest, files, METRICS)

    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(run, [1, 2]))
    assert sorted(version.version for version in versions) == [1, 2]
    with database.session() as session:
        assert aliases(session, "local", concept) == {"candidate": 2}
    mirrored = {str(version.version): version for version in mlflow_versions(settings, concept)}
    assert mirrored["2"].aliases == ["candidate"]
    for version in versions:
        assert mirrored[version.mlflow_version].run_id == version.mlflow_run_id


def test_one_job_registered_by_two_workers_at_once_is_one_version(
    database: Database, blobs: BlobStore, settings: Settings, files: dict[str, Path], concept: str
) -> None:
    manifest = manifest_of(files, new_id("job"), concept=concept)
    meet = Barrier(2, timeout=60)  # so that one who fails does not hold the other for ever

    def on_step(step: str) -> None:
        if step in ("model", "version"):
            meet.wait()

    def run(_: int) -> AdapterVersion:
        return register(database, blobs, settings, manifest, files, METRICS, on_step)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, [1, 2])
    assert one.id == other.id
    assert one.version == other.version == 1
    assert [int(version.version) for version in mlflow_versions(settings, concept)] == [1]


def test_weights_that_are_not_those_of_the_manifest_are_refused(
    database: Database, blobs: BlobStore, settings: Settings, files: dict[str, Path], concept: str
) -> None:
    manifest = manifest_of(files, new_id("job"), concept=concept)
    with files[WEIGHTS_NAME].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(InvalidRequest, match="not those of the manifest"):
        register(database, blobs, settings, manifest, files, METRICS)
    assert mlflow_versions(settings, concept) == []


def test_an_artifact_store_that_changes_the_weights_is_found_out(
    database: Database,
    blobs: BlobStore,
    settings: Settings,
    files: dict[str, Path],
    concept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    log_artifacts = MlflowClient.log_artifacts

    def corrupting(self: MlflowClient, run_id: str, folder: str, path: str) -> None:
        (Path(folder) / WEIGHTS_NAME).unlink()
        (Path(folder) / WEIGHTS_NAME).write_bytes(b"other bytes")
        log_artifacts(self, run_id, folder, path)

    monkeypatch.setattr(MlflowClient, "log_artifacts", corrupting)
    manifest = manifest_of(files, new_id("job"), concept=concept)
    with pytest.raises(OSError, match="changed pytorch_lora_weights"):
        register(database, blobs, settings, manifest, files, METRICS)
    assert mlflow_versions(settings, concept) == []


def test_an_mlflow_that_counts_anew_is_refused(
    database: Database,
    blobs: BlobStore,
    settings: Settings,
    files: dict[str, Path],
    concept: str,
) -> None:
    register(
        database, blobs, settings, manifest_of(files, "job_1", concept=concept), files, METRICS
    )
    mlflow_client(settings).delete_registered_model(f"local.{concept}")
    with pytest.raises(Conflict, match="not the MLflow used before"):
        register(
            database, blobs, settings, manifest_of(files, "job_2", concept=concept), files, METRICS
        )


def test_without_mlflow_the_missing_part_is_named(
    database: Database,
    blobs: BlobStore,
    settings: Settings,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(CapabilityMissing, match=r"pip install 'lookalike\[worker\]'"):
        register(database, blobs, settings, manifest_of(files, "job_1"), files, METRICS)


def test_the_registry_imports_neither_mlflow_nor_torch() -> None:
    program = (
        "import sys, lookalike_registry.register, lookalike_registry.versions\n"
        "assert not {'mlflow', 'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def mlflow_server(tmp_path: Path, mlflow_uri: str) -> Iterator[str]:
    """A real `mlflow server` on a free port, which keeps its artifacts itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        mlflow_uri,
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        import os
        import signal

        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.processes
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_server_by_url_works_as_well(
    database: Database,
    blobs: BlobStore,
    tmp_path: Path,
    files: dict[str, Path],
    concept: str,
    mlflow_server: str,
) -> None:
    settings = Settings(home=tmp_path, mlflow_uri=mlflow_server)
    manifest = manifest_of(files, new_id("job"), concept=concept)
    with pytest.raises(Crash):
        register(database, blobs, settings, manifest, files, METRICS, crash_after("version"))
    version = register(database, blobs, settings, manifest, files, METRICS)
    assert version.version == 1
    (mirrored,) = mlflow_versions(settings, concept)
    assert mirrored.aliases == ["candidate"]
    assert re.match(r"mlflow-artifacts:|.*/artifacts/adapter$", mirrored.source)
