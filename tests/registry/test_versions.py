from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import AdapterVersion, Job
from lookalike_platform.errors import Conflict, InvalidRequest, NotFound
from lookalike_platform.ids import new_id
from lookalike_platform.jobs.store import NewJob, submit
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.mlflow_client import mlflow_client
from lookalike_registry.register import register
from support_registry import METRICS, finished_run, manifest_of

# MLflow's own tables, with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture
def concept() -> str:
    """A concept no other test uses: all share one MLflow."""
    return new_id("teapot").replace("_", "-")


class Registry:
    """The registry with its stores at hand."""

    def __init__(
        self, db: Database, blobs: BlobStore, settings: Settings, folder: Path, concept: str
    ) -> None:
        self.db, self.blobs, self.settings = db, blobs, settings
        self.folder, self.concept = folder, concept

    def add(self, seed: int, owner: str = "local") -> AdapterVersion:
        files = finished_run(self.folder / str(seed), seed)
        manifest = manifest_of(files, new_id("job"), concept=self.concept, owner=owner)
        return register(self.db, self.blobs, self.settings, manifest, files, METRICS)

    def resolve(self, label: str = "", owner: str = "local") -> int:
        with self.db.read_session() as session:
            return versions.resolve(session, owner, self.concept + label).version

    def set_alias(self, alias: str, version: int) -> None:
        versions.set_alias(self.db, self.settings, "local", self.concept, alias, version)

    def delete(self, version: int) -> None:
        versions.delete_version(self.db, self.blobs, self.settings, "local", self.concept, version)

    def mirrored_aliases(self, version: int) -> list[str]:
        client = mlflow_client(self.settings)
        return sorted(client.get_model_version(f"local.{self.concept}", str(version)).aliases)

    def numbers(self) -> list[int]:
        with self.db.read_session() as session:
            return [row.version for row in versions.list_versions(session, "local", self.concept)]


@pytest.fixture
def registry(
    database: Database, blobs: BlobStore, settings: Settings, tmp_path: Path, concept: str
) -> Registry:
    return Registry(database, blobs, settings, tmp_path / "runs", concept)


def test_a_bare_name_means_production_once_there_is_one_and_the_candidate_before(
    registry: Registry,
) -> None:
    registry.add(1)
    registry.add(2)
    assert registry.resolve() == 2
    registry.set_alias("production", 1)
    assert registry.resolve() == 1
    assert registry.resolve("@candidate") == 2
    assert registry.resolve("@2") == 2
    assert registry.mirrored_aliases(1) == ["production"]
    assert registry.mirrored_aliases(2) == ["candidate"]


def test_an_alias_moves_here_and_in_mlflow(registry: Registry) -> None:
    registry.add(1)
    registry.add(2)
    registry.set_alias("best", 1)
    registry.set_alias("best", 2)
    assert registry.resolve("@best") == 2
    assert registry.mirrored_aliases(1) == []
    assert registry.mirrored_aliases(2) == ["best", "candidate"]


@pytest.mark.parametrize("alias", ["", "3", "v3", "latest", "Best", "a b", "-x", "é", "a" * 64])
def test_what_mlflow_or_a_reference_would_misread_is_no_alias(
    registry: Registry, alias: str
) -> None:
    with pytest.raises(InvalidRequest, match="cannot be an alias"):
        registry.set_alias(alias, 1)


def test_references_to_nothing_say_what_there_is(registry: Registry) -> None:
    with pytest.raises(NotFound, match="There is no adapter"):
        registry.resolve()
    registry.add(1)
    with pytest.raises(NotFound, match=r"has: .*@candidate, .*@1"):
        registry.resolve("@production")
    with pytest.raises(NotFound, match="There is no version"):
        registry.resolve("@7")
    with pytest.raises(NotFound):
        registry.set_alias("best", 7)


@pytest.mark.parametrize(
    "label", ["@", "@@1", "@1@", "@" + "9" * 30, "@1\n", "\0", "@\0", "@\ud800", " ", "/x", "@²"]
)
def test_what_is_no_reference_is_not_found(registry: Registry, label: str) -> None:
    with pytest.raises(NotFound, match="names no adapter"):
        registry.resolve(label)


def test_another_owners_adapter_is_not_found(registry: Registry) -> None:
    registry.add(1, owner="someone")
    for label in ("", "@1", "@candidate"):
        with pytest.raises(NotFound):
            registry.resolve(label)
    with pytest.raises(NotFound):
        registry.delete(1)
    with registry.db.read_session() as session:
        assert versions.list_adapters(session, "local") == ([], None)
        with pytest.raises(NotFound):
            versions.list_versions(session, "local", registry.concept)


def test_concepts_are_listed_by_name_in_pages(registry: Registry) -> None:
    base = registry.concept
    for letter in "bca":
        registry.concept = f"{letter}-{base}"
        registry.add(1)
    registry.add(2)
    with registry.db.read_session() as session:
        page, cursor = versions.list_adapters(session, "local", limit=2)
        rest, end = versions.list_adapters(session, "local", cursor=cursor, limit=2)
    assert [adapter.concept[0] for adapter in page + rest] == ["a", "b", "c"]
    assert end is None
    assert (page[0].versions, page[0].latest.version) == (2, 2)
    assert page[0].aliases == {"candidate": 2}


def test_a_deleted_version_is_gone_with_its_aliases_and_files_and_its_number_stays_used(
    registry: Registry,
) -> None:
    registry.add(1)
    second = registry.add(2)
    registry.delete(2)
    assert registry.numbers() == [1]
    with pytest.raises(NotFound):
        registry.resolve("@candidate")
    assert not registry.blobs.exists(second.digest)
    assert not registry.blobs.exists(second.manifest["evaluation"]["sample_grid"])
    client = mlflow_client(registry.settings)
    mirrored = client.search_model_versions(f"name = 'local.{registry.concept}'")
    assert [int(version.version) for version in mirrored] == [1]
    assert registry.add(3).version == 3


def test_files_another_version_has_too_are_kept_until_both_are_deleted(registry: Registry) -> None:
    digest = registry.add(1).digest
    assert registry.add(1).digest == digest
    registry.delete(1)
    assert registry.blobs.exists(digest)
    registry.delete(2)
    assert not registry.blobs.exists(digest)


def test_deleting_twice_is_harmless_and_deleting_nothing_is_not_found(registry: Registry) -> None:
    registry.add(1)
    registry.delete(1)
    registry.delete(1)
    with pytest.raises(NotFound):
        registry.delete(2)


def test_a_version_in_production_is_kept(registry: Registry) -> None:
    registry.add(1)
    registry.set_alias("production", 1)
    with pytest.raises(Conflict, match="is in production"):
        registry.delete(1)
    assert registry.resolve() == 1


def test_a_version_that_is_being_admitted_somewhere_waits_to_be_deleted(
    registry: Registry,
) -> None:
    """By a lock on its row, which several admissions share and a deletion wants for itself."""
    if registry.db.engine.dialect.name == "sqlite":
        pytest.skip("SQLite's sessions take its one write lock")
    version = registry.add(1)
    row = select(AdapterVersion.id).where(AdapterVersion.id == version.id)
    with registry.db.session() as session:
        versions.resolve(session, "local", registry.concept, lock=True)
        with registry.db.session() as other:
            versions.resolve(other, "local", f"{registry.concept}@1", lock=True)
            with pytest.raises(OperationalError, match="could not obtain lock"):
                other.execute(row.with_for_update(nowait=True))
            other.rollback()
    registry.delete(1)
    with pytest.raises(NotFound):
        registry.resolve()


def test_a_version_is_kept_while_a_generation_uses_it(registry: Registry) -> None:
    version = registry.add(1)
    other = registry.add(2)
    with registry.db.session() as session:
        new = NewJob(
            owner="local",
            kind="generate",
            base_model="tiny",
            base_fingerprint="f",
            request={"adapters": [{"id": version.id, "scale": 1.0}]},
        )
        job = submit(session, new).id
    with pytest.raises(Conflict, match=job):
        registry.delete(1)
    registry.delete(other.version)
    with registry.db.session() as session:
        found = session.get(Job, job)
        assert found is not None
        found.state = "canceled"
    registry.delete(1)
