"""The API for tests: served over real HTTP from this process, and looked at from behind."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlalchemy import func, select

from lookalike_api.client import Client
from lookalike_api.http.app import create_app
from lookalike_api.http.context import Context
from lookalike_platform import bases
from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import AdapterAlias, AdapterVersion, Table
from lookalike_platform.ids import new_id
from lookalike_platform.settings import Settings
from lookalike_registry.adapter_file import WEIGHTS_NAME
from lookalike_registry.manifest import version_id
from lookalike_registry.register import register
from support_images import photo
from support_registry import finished_run, manifest_of


@dataclass
class Api:
    """A running API, and what it keeps."""

    settings: Settings
    context: Context
    url: str
    http: httpx.Client

    @property
    def client(self) -> Client:
        return Client(self.url)

    def kept(self) -> dict[str, Any]:
        """How many rows each table has, and the blobs there are."""
        with self.context.db.read_session() as session:
            rows: dict[str, Any] = {
                table.name: session.scalar(select(func.count()).select_from(table))
                for table in Table.metadata.sorted_tables
            }
        blobs = self.settings.home / "blobs"
        return {**rows, "blobs": sorted(f.name for f in blobs.rglob("*") if f.is_file())}

    def add_set(self, name: str = "rex", number: int = 3, class_noun: str = "dog") -> Any:
        files = [("images", (f"{i}.jpg", photo(i), "image/jpeg")) for i in range(number)]
        data = {"name": name, "class_noun": class_noun}
        made = self.http.post("/v1/subject-sets", data=data, files=files)
        assert made.status_code == 201, made.text
        return made.json()

    def add_version(self, concept: str = "rex", **options: Any) -> AdapterVersion:
        """See `add_version` below."""
        context = self.context
        return add_version(self.settings, context.db, context.blobs, concept, **options)

    def register_version(self, concept: str = "rex") -> AdapterVersion:
        """A version that MLflow knows too, as a worker registers it."""
        job_id = new_id("job")
        files = finished_run(self.settings.home / "runs" / job_id)
        manifest = manifest_of(files, job_id, concept=concept, owner="local")
        context = self.context
        return register(context.db, context.blobs, self.settings, manifest, files, [])


def add_version(
    settings: Settings,
    db: Database,
    blobs: BlobStore,
    concept: str = "rex",
    *,
    aliases: tuple[str, ...] = ("candidate",),
    base: str = "pocket-64",
    trigger: str = "sks",
    owner: str = "local",
    method: str = "lora",
    weights: Path | None = None,
    prompting: Mapping[str, Any] | None = None,
) -> AdapterVersion:
    """Register a version without asking MLflow; `base`: whose fingerprint it has.

    weights: a LoRA, or another method's adapter file; prompting: what its record says otherwise.
    """
    found = bases.resolve(base, settings)
    job_id = new_id("job")
    files = finished_run(settings.home / "runs" / job_id)
    if weights is not None:
        files[WEIGHTS_NAME] = weights
    for path in files.values():
        blobs.put_file(path)
    manifest = manifest_of(files, job_id, concept=concept, owner=owner)
    record = manifest.base.model_copy(update={"name": base, "fingerprint": found.fingerprint})
    said = {"trigger": trigger, "class_noun": "dog", **(prompting or {})}
    changed = {
        "identity": manifest.identity.model_copy(update={"method": method}),
        "base": record,
        "prompting": manifest.prompting.model_copy(update=said),
    }
    manifest = manifest.model_copy(update=changed)
    with db.session() as session:
        newest = select(func.max(AdapterVersion.version)).where(
            AdapterVersion.owner == owner, AdapterVersion.concept == concept
        )
        version = AdapterVersion(
            id=version_id(job_id),
            owner=owner,
            concept=concept,
            version=(session.scalar(newest) or 0) + 1,
            job_id=job_id,
            method=method,
            base_fingerprint=found.fingerprint,
            digest=manifest.weights.sha256,
            manifest=manifest.model_dump(mode="json"),
            mlflow_model=f"{owner}.{concept}",
            mlflow_version="1",
            mlflow_run_id="run",
            created_at=time.time(),
        )
        session.add(version)
        session.flush()
        for alias in aliases:
            row = AdapterAlias(owner=owner, concept=concept, alias=alias, version=version.version)
            session.merge(row)
    return version


@contextmanager
def serving(settings: Settings, port: int = 0) -> Iterator[Api]:
    """Serve the API on a port (0: a free one), from a thread, until the block ends."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
    app.state.context.stopping = lambda: server.should_exit
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            yield Api(settings, app.state.context, url, http)
    finally:
        server.should_exit = True
        thread.join()


def problem_of(response: httpx.Response, status: int) -> Any:
    """The problem a refusal carries, checked to be one that says what to do."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:lookalike:problem:")
    assert len(problem["detail"]) > 10
    return problem


def paths_of(response: httpx.Response) -> list[str]:
    """Where the wrong values of a 422 stand."""
    return [error["path"] for error in problem_of(response, 422).get("errors", [])]
