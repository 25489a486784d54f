"""Images: pictures to paint from and masks, uploaded one by one and named in generations."""

from typing import Annotated

from fastapi import APIRouter, File, Query, UploadFile
from fastapi.responses import Response

from lookalike_api.http.context import Id, Lookalike, Owner
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Moment, Page, Paging, View
from lookalike_datasets import images
from lookalike_platform.errors import FieldProblem, InvalidRequest

router = APIRouter(prefix="/v1/images", tags=["images"])


class UploadView(View):
    """An image as it is kept: upright, re-encoded, without metadata. It never changes."""

    id: str
    filename: str
    sha256: str
    width: int
    height: int
    created_at: Moment


class UploadPage(Page):
    items: list[UploadView]


@router.post("", status_code=201, responses=documented(413, 422))
def add_image(
    context: Lookalike,
    owner: Owner,
    image: Annotated[UploadFile, File(description="JPEG, PNG or WebP")],
) -> UploadView:
    """Upload a picture to start from, or a mask: white where to paint, black where not."""
    name = image.filename or "unnamed"
    if not name.isprintable() or len(name) > 255:
        message = "rename it to plain text"
        raise InvalidRequest("A file's name cannot be kept.", [FieldProblem("image", message)])
    made = images.add(context.db, context.blobs, owner, name, image.file, context.settings)
    return UploadView.model_validate(made)


@router.get("", responses=documented(422))
def list_images(context: Lookalike, owner: Owner, paging: Annotated[Paging, Query()]) -> UploadPage:
    """The images, newest first."""
    with context.db.read_session() as session:
        found, cursor = images.list_images(session, owner, cursor=paging.cursor, limit=paging.limit)
    return UploadPage(items=[UploadView.model_validate(one) for one in found], next_cursor=cursor)


@router.get("/{image_id}", responses=documented(404, 422))
def get_image(context: Lookalike, owner: Owner, image_id: Id) -> UploadView:
    with context.db.read_session() as session:
        return UploadView.model_validate(images.get(session, owner, image_id))


@router.get(
    "/{image_id}/file",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 422)},
)
def get_file(context: Lookalike, owner: Owner, image_id: Id) -> Response:
    """The image itself, as a PNG."""
    with context.db.read_session() as session:
        found = images.get(session, owner, image_id)
    return Response(context.blobs.get(found.sha256), media_type="image/png")


@router.delete("/{image_id}", status_code=204, responses=documented(404, 409, 422))
def delete_image(context: Lookalike, owner: Owner, image_id: Id) -> None:
    """Delete an image that no unfinished job uses. Pictures made from it stay."""
    images.delete(context.db, context.blobs, owner, image_id)
