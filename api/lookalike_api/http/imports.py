"""Imports: adapters of other programs as versions here. Done at once, with no job to wait for."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from fastapi import APIRouter, File, Form, UploadFile
from pydantic import JsonValue

from lookalike_api.http.adapters import VersionView, version_view
from lookalike_api.http.context import Lookalike, Owner
from lookalike_api.http.problems import documented
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.errors import fault_of
from lookalike_platform.files import canonical_digest, sha256_file
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.formats.process import About, import_apart
from lookalike_registry.manifest import (
    NAME_PATTERN,
    Identity,
    Lineage,
    Manifest,
    Prompting,
    base_record,
    version_id,
    weights_record,
)
from lookalike_registry.register import register

router = APIRouter(prefix="/v1/imports", tags=["adapters"])

Word = r"^[\w-]{1,40}$"


@router.post("", status_code=201, responses=documented(413, 422))
def import_adapter(
    context: Lookalike,
    owner: Owner,
    name: Annotated[str, Form(pattern=NAME_PATTERN, examples=["rex"])],
    class_noun: Annotated[str, Form(min_length=1, max_length=40, examples=["dog"])],
    trigger: Annotated[str, Form(pattern=Word, description="the word that prompts use")],
    files: Annotated[list[UploadFile], File(description="weights, learned words, or both")],
    base_model: Annotated[str | None, Form(description="what it was trained on")] = None,
) -> VersionView:
    """Make a version of an adapter of another program: one file, or weights and a learned word.

    LoRA in the layout of diffusers or of kohya (A1111, ComfyUI), learned embeddings, and Custom
    Diffusion's weights as diffusers writes them; safetensors only. A key that is not understood
    refuses the file by its name. The same files under the same name are the same version.
    """
    base = _base(context.settings, base_model)
    with TemporaryDirectory() as scratch:
        sent = _keep(files, Path(scratch))
        about = About(name, base.family, base.resolution, trigger, base.prediction_type, class_noun)
        method, weights = import_apart(sent, base.folder, about, Path(scratch))
        record = _manifest(owner, name, class_noun, trigger, method, weights, sent, base)
        files_of = {weights.name: weights}
        version = register(context.db, context.blobs, context.settings, record, files_of, [])
    with context.db.read_session() as session:
        return version_view(version, versions.aliases(session, owner, name))


def _base(settings: Settings, name: str | None) -> Base:
    with fault_of("base_model"):
        return bases.resolve(name or settings.default_base, settings)


def _keep(files: list[UploadFile], folder: Path) -> list[Path]:
    """The uploads as files, under names that only tell their order and their kind."""
    kept = []
    for place, file in enumerate(files):
        given = Path(file.filename or "unnamed")
        kept.append(folder / f"upload-{place}{given.suffix.lower()}")
        with kept[-1].open("wb") as out:
            while piece := file.file.read(2**20):
                out.write(piece)
    return kept


def _manifest(
    owner: str,
    name: str,
    class_noun: str,
    trigger: str,
    method: str,
    weights: Path,
    sent: list[Path],
    base: Base,
) -> Manifest:
    """The record of a version that no job made: its id is of its content."""
    origin = [sha256_file(file) for file in sent]
    digest = canonical_digest([owner, name, class_noun, trigger, base.fingerprint, origin])
    made_by = f"job_import{digest[:24]}"
    return Manifest(
        identity=Identity(
            id=version_id(made_by), job_id=made_by, owner=owner, concept=name, method=method
        ),
        weights=weights_record(weights),
        base=base_record(base),
        prompting=Prompting(class_noun=class_noun, trigger=trigger),
        lineage=Lineage(
            subject_set="",
            subject_set_digest="",
            images=[],
            config={"imported": list[JsonValue](origin), "resolution": base.resolution},
            seed=0,
            libraries={},
            world_size=1,
            zero_stage=0,
            attempts=1,
        ),
    )
