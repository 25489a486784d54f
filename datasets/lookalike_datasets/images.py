"""Uploaded images: pictures to paint from, and masks; checked as photos of subjects are."""

import time
from typing import BinaryIO

from sqlalchemy import delete as delete_rows
from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_datasets.blobs_in_use import delete_unused
from lookalike_datasets.intake import examine
from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.locks import hold_blobs
from lookalike_platform.db.pages import page_of
from lookalike_platform.db.tables import Job, UploadedImage
from lookalike_platform.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from lookalike_platform.files import sha256_bytes
from lookalike_platform.ids import new_id
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.settings import Settings


def add(
    db: Database, blobs: BlobStore, owner: str, filename: str, file: BinaryIO, settings: Settings
) -> UploadedImage:
    """Examine a file and keep its pixels. Raises InvalidRequest, saying why it is refused."""
    verdict = examine(filename, file, settings, to_learn_from=False)
    if not verdict.accepted:
        message = f"{filename}: {verdict.reason}"
        raise InvalidRequest("The image cannot be used.", [FieldProblem("image", message)])
    made = UploadedImage(
        id=new_id("img"),
        owner=owner,
        filename=filename,
        sha256=sha256_bytes(verdict.png),
        width=verdict.width,
        height=verdict.height,
        created_at=time.time(),
    )
    try:
        blobs.put(verdict.png)
        with db.session() as session:
            hold_blobs(session)
            blobs.put(verdict.png)  # written again only if a deletion has taken it since
            session.add(made)
    except BaseException:
        delete_unused(db, blobs, [made.sha256])
        raise
    return made


def get(session: Session, owner: str, id: str, *, lock: bool = False) -> UploadedImage:
    """The owner's image. Raises NotFound, also for another owner's.

    Args:
        lock: nobody deletes it before the transaction ends.
    """
    query = select(UploadedImage).where(UploadedImage.id == id, UploadedImage.owner == owner)
    found = session.scalar(query.with_for_update(read=True) if lock else query)
    if found is None:
        raise NotFound(f"There is no image {id!r}; GET /v1/images lists those there are.")
    return found


def list_images(
    session: Session, owner: str, *, cursor: str | None = None, limit: int = 20
) -> tuple[list[UploadedImage], str | None]:
    """A page of the owner's images, newest first, and the cursor of the next page if there is
    one."""
    mine = UploadedImage.owner == owner
    return page_of(session, UploadedImage, mine, prefix="img_", cursor=cursor, limit=limit)


def delete(db: Database, blobs: BlobStore, owner: str, id: str) -> None:
    """Deletes an image, and its pixels if nothing else has them.

    Raises:
        NotFound: no such image of this owner.
        Conflict: a job that is not finished uses it.
    """
    with db.session() as session:
        found = get(session, owner, id)
        session.refresh(found, with_for_update=True)  # a generation submitted now waits, and fails
        _refuse_in_use(session, found)
        session.execute(delete_rows(UploadedImage).where(UploadedImage.id == id))
    delete_unused(db, blobs, [found.sha256])


def _refuse_in_use(session: Session, image: UploadedImage) -> None:
    unfinished = session.scalars(
        select(Job).where(
            Job.owner == image.owner, Job.kind == "generate", Job.state.not_in(TERMINAL)
        )
    )
    for job in unfinished:
        wanted = job.request
        masks = [region["mask_image"] for region in wanted.get("regions", [])]
        named = [wanted.get("init_image"), wanted.get("mask_image"), *masks]
        if any(one["id"] == image.id for one in named if one):
            raise Conflict(f"Job {job.id} uses this image. Wait for it, or cancel it.")
