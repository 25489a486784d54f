"""Registered versions: found by reference, listed, aliased and deleted.

A reference names a version (`teapot@3`) or an alias (`teapot@production`); a bare name means
`production` where that is set, else `candidate`.
"""

import re
import time
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.locks import hold_blobs
from lookalike_platform.db.tables import AdapterAlias, AdapterVersion, Job
from lookalike_platform.errors import Conflict, InvalidRequest, NotFound
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.settings import Settings
from lookalike_registry.mlflow_client import delete_mirrored, mirror_alias, mlflow_client
from lookalike_registry.register import CANDIDATE

PRODUCTION = "production"
ALIAS = re.compile(r"(?!latest$|v\d+$)[a-z][a-z0-9_-]{0,62}")
"""MLflow keeps `latest` and `v3` for itself."""

REFERENCE = re.compile(
    r"(?P<concept>[a-z0-9][a-z0-9-]{0,62})(@(?P<label>[0-9]{1,9}|[a-z][a-z0-9_-]{0,62}))?"
)


@dataclass(frozen=True)
class Adapter:
    """One concept and what there is of it."""

    concept: str
    versions: int
    latest: AdapterVersion
    aliases: dict[str, int]


def resolve(session: Session, owner: str, reference: str, *, lock: bool = False) -> AdapterVersion:
    """The version a reference means now.

    Args:
        lock: nobody deletes it before the transaction ends.

    Raises:
        NotFound: no such concept, alias or version of this owner.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise NotFound(f"{reference!r} names no adapter; write name, name@alias or name@3.")
    concept, label = match["concept"], match["label"]
    if label is not None and label.isdigit():
        return _version(session, owner, concept, int(label), keep=lock)
    known = aliases(session, owner, concept)
    wanted = [PRODUCTION, CANDIDATE] if label is None else [label]
    for alias in wanted:
        if alias in known:
            return _version(session, owner, concept, known[alias], keep=lock)
    numbers = [version.version for version in _live(session, owner, concept)]
    if not numbers:
        raise NotFound(f"There is no adapter {concept!r}. List them with: lookalike adapters")
    choices = [*sorted(known), *(str(number) for number in numbers[:5])]
    raise NotFound(
        f"{reference!r} names no version; {concept} has: "
        + ", ".join(f"{concept}@{choice}" for choice in choices)
    )


def list_adapters(
    session: Session, owner: str, *, cursor: str | None = None, limit: int = 20
) -> tuple[list[Adapter], str | None]:
    """A page of the owner's concepts by name, and the cursor of the next page if there is one."""
    query = (
        select(AdapterVersion.concept, func.count(), func.max(AdapterVersion.version))
        .where(AdapterVersion.owner == owner, AdapterVersion.deleted_at.is_(None))
        .group_by(AdapterVersion.concept)
        .order_by(AdapterVersion.concept)
        .limit(limit + 1)
    )
    if cursor is not None:
        query = query.where(AdapterVersion.concept > cursor)
    rows = session.execute(query).all()
    page = [
        Adapter(
            concept,
            count,
            _version(session, owner, concept, latest),
            aliases(session, owner, concept),
        )
        for concept, count, latest in rows[:limit]
    ]
    return page, page[-1].concept if len(rows) > limit else None


def list_versions(session: Session, owner: str, concept: str) -> list[AdapterVersion]:
    """The concept's versions, newest first. Raises NotFound if there are none."""
    versions = _live(session, owner, concept)
    if not versions:
        raise NotFound(f"There is no adapter {concept!r}. List them with: lookalike adapters")
    return versions


def aliases(session: Session, owner: str, concept: str) -> dict[str, int]:
    """The concept's aliases and the versions they mean."""
    rows = session.scalars(
        select(AdapterAlias)
        .where(AdapterAlias.owner == owner, AdapterAlias.concept == concept)
        .order_by(AdapterAlias.alias)
        .execution_options(populate_existing=True)
    )
    return {row.alias: row.version for row in rows}


def set_alias(
    db: Database, settings: Settings, owner: str, concept: str, alias: str, version: int
) -> AdapterVersion:
    """Points an alias at a version, here and in MLflow.

    Raises:
        InvalidRequest: the alias is no name for one.
        NotFound: no such version.
    """
    if not ALIAS.fullmatch(alias):
        raise InvalidRequest(
            f"{alias!r} cannot be an alias: it starts with a letter, has only a–z, 0–9, - and _,"
            " and is neither 'latest' nor like 'v3'."
        )
    client = mlflow_client(settings)
    with db.session() as session:
        row = _version(session, owner, concept, version, lock=True)
        session.merge(AdapterAlias(owner=owner, concept=concept, alias=alias, version=version))
    mirror_alias(db, client, owner, concept, alias)
    return row


def delete_version(
    db: Database,
    blobs: BlobStore,
    settings: Settings,
    owner: str,
    concept: str,
    version: int,
) -> None:
    """Deletes a version, the aliases that mean it, and the blobs no other version uses.

    Its number is never given again. Repeating the call finishes what an interrupted one left.

    Raises:
        NotFound: there never was such a version.
        Conflict: it is in production, or a job that is not finished uses it.
    """
    client = mlflow_client(settings)
    with db.session() as session:
        row = _version(session, owner, concept, version, lock=True, deleted=True)
        known = aliases(session, owner, concept)
        gone = [alias for alias, number in known.items() if number == version]
        if PRODUCTION in gone:
            raise Conflict(
                f"{concept}@{version} is in production. Point {PRODUCTION} at another version"
                " first."
            )
        _refuse_in_use(session, row)
        session.execute(
            delete(AdapterAlias).where(
                AdapterAlias.owner == owner,
                AdapterAlias.concept == concept,
                AdapterAlias.version == version,
            )
        )
        row.deleted_at = row.deleted_at or time.time()
    delete_mirrored(client, row.mlflow_model, row.mlflow_version)
    _delete_unused_blobs(db, blobs, row)


def _version(
    session: Session,
    owner: str,
    concept: str,
    version: int,
    *,
    lock: bool = False,
    keep: bool = False,
    deleted: bool = False,
) -> AdapterVersion:
    """lock: nobody else changes it before the transaction ends; keep: nobody changes it."""
    query = select(AdapterVersion).where(
        AdapterVersion.owner == owner,
        AdapterVersion.concept == concept,
        AdapterVersion.version == version,
    )
    if not deleted:
        query = query.where(AdapterVersion.deleted_at.is_(None))
    if lock or keep:
        query = query.with_for_update(read=not lock)
    row = session.scalar(query)
    if row is None:
        raise NotFound(f"There is no version {concept}@{version}.")
    return row


def _live(session: Session, owner: str, concept: str) -> list[AdapterVersion]:
    return list(
        session.scalars(
            select(AdapterVersion)
            .where(
                AdapterVersion.owner == owner,
                AdapterVersion.concept == concept,
                AdapterVersion.deleted_at.is_(None),
            )
            .order_by(AdapterVersion.version.desc())
        )
    )


def _refuse_in_use(session: Session, version: AdapterVersion) -> None:
    unfinished = session.scalars(
        select(Job).where(
            Job.owner == version.owner,
            Job.kind.in_(["generate", "evaluate", "compose"]),
            Job.state.not_in(TERMINAL),
        )
    )
    for job in unfinished:
        wearers = [job.request, *job.request.get("regions", [])]
        if any(adapter["id"] == version.id for one in wearers for adapter in one["adapters"]):
            raise Conflict(f"Job {job.id} is using {version.ref}. Wait for it, or cancel it.")


def _delete_unused_blobs(db: Database, blobs: BlobStore, version: AdapterVersion) -> None:
    grid = version.manifest["evaluation"]["sample_grid"]
    live = select(AdapterVersion.id).where(AdapterVersion.deleted_at.is_(None)).limit(1)
    grids = AdapterVersion.manifest["evaluation"]["sample_grid"].as_string()
    with db.session() as session:
        hold_blobs(session)
        if session.scalar(live.where(AdapterVersion.digest == version.digest)) is None:
            blobs.delete(version.digest)
        if grid is not None and session.scalar(live.where(grids == grid)) is None:
            blobs.delete(grid)
