"""Tables of the project's database, which is the truth about everything accepted.

Times are UTC seconds since the epoch (float): they compare and index alike on SQLite and
PostgreSQL. Every object has an `owner`; every query filters by it.
"""

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_JSON = JSON(none_as_null=True)


class Table(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: _JSON, list[Any]: _JSON}  # noqa: RUF012


class SubjectSet(Table):
    """An immutable set of photos of one subject. `digest` covers images, captions and noun."""

    __tablename__ = "subject_sets"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    class_noun: Mapped[str]
    digest: Mapped[str]
    created_at: Mapped[float]
    __table_args__ = (Index("ix_subject_sets_owner", "owner", "created_at", "id"),)


class SubjectImage(Table):
    """One uploaded file and its verdict; only accepted ones have a blob (`sha256`)."""

    __tablename__ = "subject_images"
    set_id: Mapped[str] = mapped_column(
        ForeignKey("subject_sets.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    filename: Mapped[str]
    verdict: Mapped[str]  # accepted | refused
    reason: Mapped[str | None]
    warnings: Mapped[list[Any]]
    sha256: Mapped[str | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    caption: Mapped[str | None]


class UploadedImage(Table):
    """A picture to paint from, or a mask. Its blob is a PNG."""

    __tablename__ = "images"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    filename: Mapped[str]
    sha256: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    created_at: Mapped[float]
    __table_args__ = (
        Index("ix_images_owner", "owner", "id"),
        Index("ix_images_sha256", "sha256"),
    )


class Job(Table):
    """One unit of queued work. Kinds and their states are in `jobs/states.py`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    kind: Mapped[str]
    method: Mapped[str | None]
    concept: Mapped[str | None]
    subject_set_id: Mapped[str | None] = mapped_column(
        ForeignKey("subject_sets.id", ondelete="SET NULL")
    )
    base_model: Mapped[str]
    base_fingerprint: Mapped[str]
    request: Mapped[dict[str, Any]]
    state: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_expires: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    __table_args__ = (
        Index("ix_jobs_owner", "owner", "id"),
        Index("ix_jobs_lease", "state", "lease_expires"),
    )


class Attempt(Table):
    """History of claims: who ran the job, from which step, and how it ended."""

    __tablename__ = "job_attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    resumed_step: Mapped[int | None]
    outcome: Mapped[str | None]  # succeeded | failed | canceled | lost | drained


class Outbox(Table):
    """The message owed to the broker for a job: one row, sent at least once by the relay."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), unique=True)
    queue: Mapped[str]
    created_at: Mapped[float]
    published_at: Mapped[float | None] = mapped_column(index=True)


class JobEvent(Table):
    """Durable event log; `seq` is the Last-Event-ID of the server-sent stream."""

    __tablename__ = "job_events"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str]  # info | warning | error
    type: Mapped[str]  # state | message | metrics | image
    payload: Mapped[dict[str, Any]]
    __table_args__ = (
        Index("ix_job_events_job", "job_id", "seq"),
        {"sqlite_autoincrement": True},
    )


class IdempotencyKey(Table):
    """First answer to a keyed POST; `fingerprint` is the digest of the body it came with."""

    __tablename__ = "idempotency_keys"
    owner: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    status: Mapped[int]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class AdapterVersion(Table):
    """One registered adapter: the manifest, and where MLflow keeps it."""

    __tablename__ = "adapter_versions"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    concept: Mapped[str]
    version: Mapped[int]
    job_id: Mapped[str] = mapped_column(unique=True)
    method: Mapped[str]
    base_fingerprint: Mapped[str]
    digest: Mapped[str]  # sha256 of the weights file, its blob's name
    manifest: Mapped[dict[str, Any]]
    mlflow_model: Mapped[str]
    mlflow_version: Mapped[str]
    mlflow_run_id: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    __table_args__ = (UniqueConstraint("owner", "concept", "version"),)

    @property
    def ref(self) -> str:
        """As references name it: `name@3`."""
        return f"{self.concept}@{self.version}"


class AdapterAlias(Table):
    """`name@alias` → version; mirrored to MLflow, read from here on the request path."""

    __tablename__ = "adapter_aliases"
    owner: Mapped[str] = mapped_column(primary_key=True)
    concept: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
