"""A compose job's ways to its end, in a process of its own as the worker starts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lookalike_platform import bases
from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.db.engine import Database, migrate, open_database
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import NotFound
from lookalike_platform.jobs import store
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.manifest import Manifest
from lookalike_trainers.composition import task
from lookalike_trainers.composition.request import ComposeJob, MergeOptions, PinnedParent
from support_api import add_version
from support_jobs import look
from support_models import save_base
from support_sampling import save_adapter

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def local(tmp_path: Path, base: Path) -> Settings:
    return Settings(home=tmp_path / "home", device="cpu", default_base=str(base))


@pytest.fixture
def db(local: Settings) -> Any:
    local.home.mkdir()
    migrate(local.database_url)
    database = open_database(local.database_url)
    yield database
    database.close()


@pytest.fixture
def blobs(local: Settings) -> BlobStore:
    return open_blobs(local)


@pytest.fixture
def parents(
    local: Settings, db: Database, blobs: BlobStore, base: Path, tmp_path: Path
) -> list[AdapterVersion]:
    made = []
    for seed, name in enumerate(("rex", "tom")):
        path = tmp_path / f"{name}.safetensors"
        save_adapter(path, base, seed)
        trigger = ("sks", "zwx")[seed]
        made.append(
            add_version(local, db, blobs, name, base=str(base), trigger=trigger, weights=path)
        )
    return made


def submit(
    local: Settings, db: Database, parents: list[AdapterVersion], strategy: str = "ssr"
) -> str:
    known = bases.resolve(local.default_base, local)
    job = ComposeJob(
        name="duo",
        strategy=strategy,
        options=MergeOptions(seed=3),
        adapters=[
            PinnedParent(
                id=one.id,
                ref=f"{one.concept}@1",
                digest=one.digest,
                method="lora",
                scale=0.5,
                subjects=Manifest.model_validate(one.manifest).subjects,
            )
            for one in parents
        ],
    )
    new = store.NewJob(
        owner="local",
        kind="compose",
        concept="duo",
        base_model=local.default_base,
        base_fingerprint=known.fingerprint,
        request=job.model_dump(mode="json"),
    )
    with db.session() as session:
        return store.submit(session, new).id


def carry_out(local: Settings, db: Database, blobs: BlobStore, job_id: str) -> Any:
    task.run(job_id, "worker", db, blobs, local)
    return look(db, job_id)


def test_a_merge_becomes_a_version_with_all_its_lineage(
    local: Settings, db: Database, blobs: BlobStore, parents: list[AdapterVersion]
) -> None:
    known = carry_out(local, db, blobs, submit(local, db, parents))
    assert known.job.error is None
    assert known.states == ["queued", "preparing", "composing", "registering", "succeeded"]
    assert known.job.result["ref"] == "duo@1"
    assert not (local.runs / known.job.id).exists()
    with db.read_session() as session:
        version = versions.resolve(session, "local", "duo@candidate")
    assert (version.method, version.digest) == ("lora", known.job.result["digest"])
    assert blobs.exists(version.digest)
    manifest = Manifest.model_validate(version.manifest)
    assert [(p.id, p.ref, p.digest, p.scale) for p in manifest.lineage.parents] == [
        (one.id, f"{one.concept}@1", one.digest, 0.5) for one in parents
    ]
    assert manifest.lineage.config == {"strategy": "ssr", "resolution": 64, "seed": 3}
    assert manifest.lineage.images == ["a" * 64, "b" * 64]
    assert [(s.name, s.trigger) for s in manifest.subjects] == [("rex", "sks"), ("tom", "zwx")]
    assert manifest.to_tags()["lookalike.parents"] == ",".join(one.id for one in parents)


def test_parents_may_go_once_their_merge_is_there(
    local: Settings, db: Database, blobs: BlobStore, parents: list[AdapterVersion]
) -> None:
    carry_out(local, db, blobs, submit(local, db, parents, "weighted_sum"))
    with db.session() as session:
        for one in parents:
            session.get_one(AdapterVersion, one.id).deleted_at = 1.0
    with db.read_session() as session:
        version = versions.resolve(session, "local", "duo")
    assert [p["ref"] for p in version.manifest["lineage"]["parents"]] == ["rex@1", "tom@1"]


def test_a_job_that_comes_back_with_its_result_only_registers(
    local: Settings,
    db: Database,
    blobs: BlobStore,
    parents: list[AdapterVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = submit(local, db, parents, "weighted_sum")

    def crash(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(task, "register", crash)
        with pytest.raises(SystemExit):
            task.run(job_id, "worker", db, blobs, local)
    with db.session() as session:
        job = session.get_one(task.Job, job_id)
        job.state, job.lease_owner = "queued", None
    monkeypatch.setattr(task, "launch_module", crash)
    known = carry_out(local, db, blobs, job_id)
    assert known.job.state == "succeeded"


def stop_at_once(
    patch: pytest.MonkeyPatch, why: str, beside: Callable[[], object] = lambda: None
) -> None:
    """Ask every merge to stop as soon as its process runs, long before it has loaded anything."""
    launch = task.launch_module

    def stopping(*how: Any) -> Any:
        running = launch(*how)
        beside()
        running.ask_to_stop(why)
        return running

    patch.setattr(task, "launch_module", stopping)
    patch.setattr(task, "warm", lambda _: None)  # it would outlive the test


def test_a_canceled_merge_leaves_no_version(
    local: Settings,
    db: Database,
    blobs: BlobStore,
    parents: list[AdapterVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = submit(local, db, parents)

    def cancel() -> None:
        with db.session() as session:
            assert store.request_cancel(session, "local", job_id) == "requested"

    stop_at_once(monkeypatch, "cancel", cancel)
    known = carry_out(local, db, blobs, job_id)
    assert (known.job.state, known.job.result) == ("canceled", None)
    with db.read_session() as session, pytest.raises(NotFound):
        versions.resolve(session, "local", "duo")


def test_a_merge_that_a_shutdown_stopped_is_done_by_the_next_worker(
    local: Settings,
    db: Database,
    blobs: BlobStore,
    parents: list[AdapterVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = submit(local, db, parents)
    with monkeypatch.context() as patch:
        stop_at_once(patch, "drain")
        stopped = carry_out(local, db, blobs, job_id)
    assert (stopped.job.state, stopped.outcomes) == ("queued", ["drained"])
    known = carry_out(local, db, blobs, job_id)
    assert known.job.state == "succeeded"
    assert known.job.result["ref"] == "duo@1"


@pytest.mark.parametrize("gone", [False, True])
def test_a_parent_that_is_damaged_or_gone_fails_the_job_by_name(
    local: Settings,
    db: Database,
    blobs: BlobStore,
    parents: list[AdapterVersion],
    monkeypatch: pytest.MonkeyPatch,
    gone: bool,
) -> None:
    monkeypatch.setattr(task, "warm", lambda _: None)  # it would outlive the test
    job_id = submit(local, db, parents)
    file = blobs.path(parents[1].digest)
    if gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    known = carry_out(local, db, blobs, job_id)
    assert known.job.state == "failed"
    assert known.job.result is None
    reason = "its file is gone" if gone else "The file is damaged"
    assert known.job.error["detail"].startswith(f"tom@1: {reason}")
