"""Subject sets: photos of one subject, uploaded as files or as one zip."""

from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.responses import Response
from pydantic import Json
from sqlalchemy.orm import Session

from lookalike_api.http.context import Id, Lookalike, Owner
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Moment, Page, Paging, View
from lookalike_datasets import subject_sets
from lookalike_datasets.archive import read_zip
from lookalike_platform.db.tables import SubjectSet
from lookalike_platform.errors import FieldProblem, InvalidRequest, NotFound

router = APIRouter(prefix="/v1/subject-sets", tags=["subject sets"])


class ImageView(View):
    """One uploaded file and the verdict on it; a refused one is not kept."""

    position: int
    filename: str
    verdict: Literal["accepted", "refused"]
    reason: str | None
    warnings: list[str]
    sha256: str | None
    width: int | None
    height: int | None
    caption: str | None


class SubjectSetView(View):
    """A set never changes: `digest` covers its images, captions and class noun."""

    id: str
    name: str
    class_noun: str
    digest: str
    created_at: Moment
    images: list[ImageView]


class SubjectSetPage(Page):
    items: list[SubjectSetView]


@router.post("", status_code=201, responses=documented(413, 422))
def add_subject_set(
    context: Lookalike,
    owner: Owner,
    name: Annotated[str, Form(description="a–z, 0–9 and -", examples=["rex"])],
    class_noun: Annotated[str, Form(description="what the subject is", examples=["dog"])],
    captions: Annotated[
        Json[dict[str, str]] | None,
        Form(description='JSON object, file name → caption: {"a.jpg": "a dog on a sofa"}'),
    ] = None,
    images: Annotated[list[UploadFile] | None, File(description="the photos")] = None,
    archive: Annotated[
        UploadFile | None, File(description="one zip of photos, and captions as photo.txt")
    ] = None,
) -> SubjectSetView:
    """Upload photos of one subject. Each gets a verdict; with too few good ones none is kept."""
    if archive is not None and images:
        raise InvalidRequest("Send images or one archive, not both.")
    said = captions or {}
    if archive is not None:
        unpacked = read_zip(archive.file, context.settings)
        files, said = unpacked.files, {**unpacked.captions, **said}
    else:
        files = [(image.filename or "unnamed", image.file) for image in images or []]
    _check_names([name for name, _ in files])
    made = subject_sets.create(
        context.db, context.blobs, owner, name, class_noun, files, said, context.settings
    )
    with context.db.read_session() as session:
        return _view(session, made)


@router.get("", responses=documented(422))
def list_subject_sets(
    context: Lookalike, owner: Owner, paging: Annotated[Paging, Query()]
) -> SubjectSetPage:
    """The sets, newest first."""
    with context.db.read_session() as session:
        sets, cursor = subject_sets.list_sets(
            session, owner, cursor=paging.cursor, limit=paging.limit
        )
        return SubjectSetPage(items=[_view(session, one) for one in sets], next_cursor=cursor)


@router.get("/{set_id}", responses=documented(404, 422))
def get_subject_set(context: Lookalike, owner: Owner, set_id: Id) -> SubjectSetView:
    with context.db.read_session() as session:
        return _view(session, subject_sets.get(session, owner, set_id))


@router.get(
    "/{set_id}/images/{position}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 422)},
)
def get_subject_image(context: Lookalike, owner: Owner, set_id: Id, position: int) -> Response:
    """An accepted photo as it is learned from: upright, re-encoded, without metadata."""
    with context.db.read_session() as session:
        subject_sets.get(session, owner, set_id)
        for image in subject_sets.images(session, set_id):
            if image.position == position and image.sha256:
                return Response(context.blobs.get(image.sha256), media_type="image/png")
    raise NotFound(f"The set {set_id} has no accepted image at position {position}.")


@router.delete("/{set_id}", status_code=204, responses=documented(404, 409, 422))
def delete_subject_set(context: Lookalike, owner: Owner, set_id: Id) -> None:
    """Delete a set that no unfinished job uses."""
    subject_sets.delete(context.db, context.blobs, owner, set_id)


def _check_names(names: list[str]) -> None:
    """File names are shown and stored: they must be text of one line."""
    odd = [place for place, name in enumerate(names) if not name.isprintable() or len(name) > 255]
    if odd:
        raise InvalidRequest(
            "A file's name cannot be kept.",
            [FieldProblem(f"images[{place}]", "rename it to plain text") for place in odd],
        )


def _view(session: Session, one: SubjectSet) -> SubjectSetView:
    images = [ImageView.model_validate(image) for image in subject_sets.images(session, one.id)]
    fields = {name: getattr(one, name) for name in SubjectSetView.model_fields if name != "images"}
    return SubjectSetView.model_validate({**fields, "images": images})
