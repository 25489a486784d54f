"""Blobs of pictures are shared: by all sets and uploads that hold the same pixels."""

from collections.abc import Sequence

from sqlalchemy import select

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.locks import hold_blobs
from lookalike_platform.db.tables import SubjectImage, UploadedImage


def delete_unused(db: Database, blobs: BlobStore, digests: Sequence[str]) -> None:
    """Delete the blobs that no picture has any more."""
    with db.session() as session:
        hold_blobs(session)
        in_sets = select(SubjectImage.sha256).where(SubjectImage.sha256.in_(digests))
        alone = select(UploadedImage.sha256).where(UploadedImage.sha256.in_(digests))
        used = {*session.scalars(in_sets), *session.scalars(alone)}
        for digest in set(digests) - used:
            blobs.delete(digest)
