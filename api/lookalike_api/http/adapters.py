"""Adapters: what has been learned, in numbered versions with aliases, and its files."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from lookalike_api.http.context import Lookalike, Name, Owner
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Json, Moment, Page, Paging
from lookalike_platform import bases
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import InvalidRequest, NotFound
from lookalike_registry import versions
from lookalike_registry.check import registered_file
from lookalike_registry.formats.process import export_apart
from lookalike_registry.manifest import Manifest
from lookalike_registry.register import CANDIDATE, GRID_NAME

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

MANIFEST_NAME = "manifest.json"
BARE = {versions.PRODUCTION, CANDIDATE}  # the aliases a bare name can mean

Number = Annotated[int, Path(ge=1, lt=2**31)]
Label = Annotated[str, Path(pattern=r"^[\w-]{1,63}$", description="a number or an alias")]
FileName = Annotated[str, Path(pattern=r"^[\w.-]{1,100}$")]
Alias = Annotated[str, Path(pattern=r"^[\w-]{1,63}$")]


class VersionView(BaseModel):
    """One version. `digest` is the sha256 of its weights; `manifest` the whole record of it."""

    id: str
    name: str
    version: int
    ref: str
    aliases: list[str]
    method: str
    job_id: str
    base_model: str
    base_fingerprint: str
    digest: str
    trigger: str
    class_noun: str
    files: list[str]
    manifest: Json
    created_at: Moment


class Versions(BaseModel):
    items: list[VersionView]


class AdapterView(BaseModel):
    """An adapter. `default_version`: what its bare name means now."""

    name: str
    versions: int
    latest_version: int
    default_version: int | None
    aliases: dict[str, int]


class AdapterPage(Page):
    items: list[AdapterView]


class AliasTarget(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, lt=2**31, examples=[3])


@router.get("", responses=documented(422))
def list_adapters(
    context: Lookalike, owner: Owner, paging: Annotated[Paging, Query()]
) -> AdapterPage:
    """The adapters by name."""
    with context.db.read_session() as session:
        found, cursor = versions.list_adapters(
            session, owner, cursor=paging.cursor, limit=paging.limit
        )
        items = [_adapter(session, owner, one.concept) for one in found]
        return AdapterPage(items=items, next_cursor=cursor)


@router.get("/{name}", responses=documented(404, 422))
def get_adapter(context: Lookalike, owner: Owner, name: Name) -> AdapterView:
    with context.db.read_session() as session:
        return _adapter(session, owner, name)


@router.get("/{name}/versions", responses=documented(404, 422))
def list_versions(context: Lookalike, owner: Owner, name: Name) -> Versions:
    """The versions, newest first."""
    with context.db.read_session() as session:
        known = versions.aliases(session, owner, name)
        found = versions.list_versions(session, owner, name)
        return Versions(items=[version_view(version, known) for version in found])


@router.get("/{name}/versions/{label}", responses=documented(404, 422))
def get_version(context: Lookalike, owner: Owner, name: Name, label: Label) -> VersionView:
    """The version that a number or an alias means."""
    with context.db.read_session() as session:
        version = versions.resolve(session, owner, f"{name}@{label}")
        return version_view(version, versions.aliases(session, owner, name))


@router.delete("/{name}/versions/{number}", status_code=204, responses=documented(404, 409, 422))
def delete_version(context: Lookalike, owner: Owner, name: Name, number: Number) -> None:
    """Delete a version that is not in production and that no unfinished job uses."""
    versions.delete_version(context.db, context.blobs, context.settings, owner, name, number)


@router.put("/{name}/aliases/{alias}", responses=documented(404, 413, 422))
def set_alias(
    context: Lookalike, owner: Owner, name: Name, alias: Alias, target: AliasTarget
) -> VersionView:
    """Point an alias (`production`, `candidate`, or one of your own) at a version."""
    version = versions.set_alias(context.db, context.settings, owner, name, alias, target.version)
    with context.db.read_session() as session:
        return version_view(version, versions.aliases(session, owner, name))


@router.get(
    "/{name}/versions/{label}/files/{filename}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, **documented(404, 422)},
)
def get_file(
    context: Lookalike, owner: Owner, name: Name, label: Label, filename: FileName
) -> Response:
    """One of the version's `files`: its weights, the manifest, the sample grid."""
    with context.db.read_session() as session:
        version = versions.resolve(session, owner, f"{name}@{label}")
    if filename == MANIFEST_NAME:
        return Response(_manifest(version), media_type="application/json")
    blobs = _blobs(version)
    if filename not in blobs:
        files = ", ".join(_files(version))
        raise NotFound(f"{name}@{label} has no file {filename}; it has {files}.")
    return FileResponse(context.blobs.path(blobs[filename]), filename=filename)


@router.get(
    "/{name}/versions/{label}/archive",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}}, **documented(404, 422)},
)
def get_archive(context: Lookalike, owner: Owner, name: Name, label: Label) -> Response:
    """All of the version's files as one zip."""
    with context.db.read_session() as session:
        version = versions.resolve(session, owner, f"{name}@{label}")
    zipped = TemporaryFile()  # noqa: SIM115 - closed when it has been sent
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(MANIFEST_NAME, _manifest(version))
        for filename, digest in _blobs(version).items():
            archive.write(context.blobs.path(digest), filename)
    return StreamingResponse(
        _pieces(zipped),
        media_type="application/zip",
        headers={
            "Content-Disposition": f'attachment; filename="{name}-{version.version}.zip"',
            "Content-Length": str(zipped.tell()),
        },
    )


@router.get(
    "/{name}/versions/{label}/export",
    response_class=Response,
    responses={200: {"content": {"application/zip": {}}}, **documented(404, 422, 501)},
)
def export_version(
    context: Lookalike,
    owner: Owner,
    name: Name,
    label: Label,
    form: Annotated[Literal["diffusers", "lora", "kohya", "model"], Query(alias="format")],
    rank: Annotated[int | None, Query(ge=1, le=1024)] = None,
) -> Response:
    """The version as files that other programs load, in one zip.

    `diffusers`: what it is, in diffusers' own layout; `lora`: a LoRA for diffusers, made of dense
    changes by truncated SVD; `kohya`: a LoRA or an embedding for A1111 and ComfyUI; `model`: the
    base with a dense change in it, whole. Dense are the changes of Custom Diffusion, DreamBooth,
    SVDiff and, as `model` alone, DiffFit. `rank` is that of a LoRA made of a dense change; the
    header `Lookalike-Left-Out` tells which part of the change it could not hold, 0 to 1.
    """
    with context.db.read_session() as session:
        version = versions.resolve(session, owner, f"{name}@{label}")
    manifest = Manifest.model_validate(version.manifest)
    base = bases.resolve(manifest.base.name, context.settings)
    if base.fingerprint != version.base_fingerprint:
        raise InvalidRequest(
            f"{name}@{label} was trained on another base model than the {base.name} that is here."
        )
    weights = registered_file(context.blobs, version.ref, version.digest)
    with TemporaryDirectory() as folder:
        cache = context.settings.cache
        made = export_apart(weights, base.folder, form, base.family, FilePath(folder), rank, cache)
        zipped = TemporaryFile()  # noqa: SIM115 - closed when it has been sent
        with zipfile.ZipFile(zipped, "w") as archive:
            for path in made.paths:
                archive.write(path, path.relative_to(folder))
    return StreamingResponse(
        _pieces(zipped),
        media_type="application/zip",
        headers={
            "Content-Disposition": f'attachment; filename="{name}-{version.version}-{form}.zip"',
            "Content-Length": str(zipped.tell()),
            "Lookalike-Left-Out": f"{made.left_out:.4f}",
        },
    )


def _adapter(session: Session, owner: str, name: str) -> AdapterView:
    found = versions.list_versions(session, owner, name)
    known = versions.aliases(session, owner, name)
    default = versions.resolve(session, owner, name).version if known.keys() & BARE else None
    return AdapterView(
        name=name,
        versions=len(found),
        latest_version=found[0].version,
        default_version=default,
        aliases=known,
    )


def version_view(version: AdapterVersion, aliases: dict[str, int]) -> VersionView:
    manifest = Manifest.model_validate(version.manifest)
    return VersionView.model_validate(
        {
            "id": version.id,
            "name": version.concept,
            "version": version.version,
            "ref": version.ref,
            "aliases": [alias for alias, number in aliases.items() if number == version.version],
            "method": version.method,
            "job_id": version.job_id,
            "base_model": manifest.base.name,
            "base_fingerprint": version.base_fingerprint,
            "digest": version.digest,
            "trigger": manifest.prompting.trigger,
            "class_noun": manifest.prompting.class_noun,
            "files": _files(version),
            "manifest": version.manifest,
            "created_at": version.created_at,
        }
    )


def _files(version: AdapterVersion) -> list[str]:
    return [*_blobs(version), MANIFEST_NAME]


def _blobs(version: AdapterVersion) -> dict[str, str]:
    """The version's files that are blobs, with their digests."""
    manifest = Manifest.model_validate(version.manifest)
    grid = manifest.evaluation.sample_grid
    return {manifest.weights.file: version.digest, **({GRID_NAME: grid} if grid else {})}


def _manifest(version: AdapterVersion) -> str:
    return json.dumps(version.manifest, indent=2, ensure_ascii=False) + "\n"


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(2**18):
            yield piece
