"""Subject sets: a few photos of one subject, checked, kept under their digests, never changed."""

import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

from sqlalchemy import delete as delete_rows
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from lookalike_datasets import masks
from lookalike_datasets.blobs_in_use import delete_unused
from lookalike_datasets.intake import Verdict, examine, looks_alike
from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.locks import hold_blobs
from lookalike_platform.db.pages import page_of
from lookalike_platform.db.tables import Job, SubjectImage, SubjectSet
from lookalike_platform.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from lookalike_platform.files import canonical_digest, sha256_bytes
from lookalike_platform.ids import new_id
from lookalike_platform.jobs.states import TERMINAL
from lookalike_platform.settings import Settings

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""Names become `<name>` in prompts and half of MLflow's model name."""
NOUN = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
MAX_NOUN = 40


def create(
    db: Database,
    blobs: BlobStore,
    owner: str,
    name: str,
    class_noun: str,
    files: Sequence[tuple[str, BinaryIO]],
    captions: Mapping[str, str],
    settings: Settings,
) -> SubjectSet:
    """Examines the files and keeps the accepted ones as a new set.

    Args:
        files: (file name, binary file object) in the order they are to keep; masks.py says which
            are masks of others.
        captions: by file name.

    Raises:
        InvalidRequest: wrong names or captions, too many files, or too few good ones; then
            `fields` has one entry for each refused file, and nothing is stored.
    """
    captions = {key: text.strip() for key, text in captions.items() if text.strip()}
    files, found = masks.split(files)
    problems = _problems(name, class_noun, [file for file, _ in files], captions, settings)
    if problems:
        raise InvalidRequest("The subject set cannot be made as it is.", problems)
    examined = [examine(key, file, settings) for key, file in files]
    verdicts = _refuse_duplicates(
        masks.put_on(verdict, *found[verdict.filename], settings)
        if verdict.filename in found
        else verdict
        for verdict in examined
    )
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    if len(accepted) < settings.min_images:
        raise InvalidRequest(
            f"Only {len(accepted)} of {len(files)} files can be used; a set needs at least"
            f" {settings.min_images} different photos of the subject.",
            [
                FieldProblem(f"images[{position}]", f"{verdict.filename}: {verdict.reason}")
                for position, verdict in enumerate(verdicts)
                if not verdict.accepted
            ],
        )
    return _store(db, blobs, owner, name, class_noun, verdicts, captions)


def get(session: Session, owner: str, id: str) -> SubjectSet:
    """The owner's set. Raises NotFound, also for another owner's."""
    found = session.scalar(select(SubjectSet).where(SubjectSet.id == id, SubjectSet.owner == owner))
    if found is None:
        raise NotFound(
            f"There is no subject set {id!r}; GET /v1/subject-sets lists those there are."
        )
    return found


def list_sets(
    session: Session, owner: str, *, cursor: str | None = None, limit: int = 20
) -> tuple[list[SubjectSet], str | None]:
    """A page of the owner's sets, newest first, and the cursor of the next page if there is one."""
    mine = SubjectSet.owner == owner
    return page_of(session, SubjectSet, mine, prefix="set_", cursor=cursor, limit=limit)


def images(session: Session, set_id: str) -> list[SubjectImage]:
    """All files of a set in order, the refused ones with their reasons."""
    query = select(SubjectImage).where(SubjectImage.set_id == set_id)
    return list(session.scalars(query.order_by(SubjectImage.position)))


def delete(db: Database, blobs: BlobStore, owner: str, id: str) -> None:
    """Deletes a set, and the pictures no other set has.

    Raises:
        NotFound: no such set of this owner.
        Conflict: a job that is not finished uses it.
    """
    with db.session() as session:
        found = get(session, owner, id)
        session.refresh(found, with_for_update=True)  # a job submitted now waits, and fails
        of_class = Job.request["config", "prior", "subject_set"].as_string() == id
        also = Job.request["config", "also"].as_string().contains(f'"{id}"', autoescape=True)
        user = session.scalar(
            select(Job.id)
            .where(or_(Job.subject_set_id == id, of_class, also), Job.state.not_in(TERMINAL))
            .limit(1)
        )
        if user is not None:
            raise Conflict(f"Job {user} uses this set. Wait for it, or cancel it.")
        digests = [image.sha256 for image in images(session, id) if image.sha256]
        session.execute(delete_rows(SubjectSet).where(SubjectSet.id == id))
    delete_unused(db, blobs, digests)


def _problems(
    name: str,
    class_noun: str,
    files: Sequence[str],
    captions: Mapping[str, str],
    settings: Settings,
) -> list[FieldProblem]:
    problems = []
    if not NAME.fullmatch(name):
        problems.append(
            FieldProblem("name", "use 1–63 of a–z, 0–9 and -, starting with a letter or digit")
        )
    if not NOUN.fullmatch(class_noun) or len(class_noun) > MAX_NOUN:
        problems.append(
            FieldProblem(
                "class_noun", f"say what the subject is in at most {MAX_NOUN} letters, as in 'dog'"
            )
        )
    if len(files) > settings.max_images:
        problems.append(
            FieldProblem("images", f"{len(files)} files; at most {settings.max_images} are taken")
        )
    elif len(files) < settings.min_images:
        problems.append(
            FieldProblem("images", f"{len(files)} files; at least {settings.min_images} are needed")
        )
    for file, text in captions.items():
        place = f"captions.{file}"
        if files.count(file) != 1:
            problems.append(FieldProblem(place, f"{files.count(file)} files have this name"))
        if len(text) > settings.max_prompt_characters:
            problems.append(
                FieldProblem(place, f"at most {settings.max_prompt_characters} characters")
            )
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            problems.append(FieldProblem(place, "a caption is one line without control characters"))
    return problems


def _refuse_duplicates(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Equal pixels are refused; pictures that look alike get a warning.

    The PNG is a function of the pixels alone, so its digest is theirs.
    """
    judged: list[Verdict] = []
    for verdict in verdicts:
        earlier = [other for other in judged if other.accepted and verdict.accepted]
        same = next((other for other in earlier if other.png == verdict.png), None)
        alike = next((other for other in earlier if looks_alike(other.hash, verdict.hash)), None)
        if same:
            reason = f"is the same picture as {same.filename}"
            judged.append(Verdict(verdict.filename, accepted=False, reason=reason))
        else:
            if alike:
                verdict.warnings.append(f"looks almost like {alike.filename}")
            judged.append(verdict)
    return judged


def _store(
    db: Database,
    blobs: BlobStore,
    owner: str,
    name: str,
    class_noun: str,
    verdicts: Sequence[Verdict],
    captions: Mapping[str, str],
) -> SubjectSet:
    digests = [sha256_bytes(verdict.png) if verdict.accepted else None for verdict in verdicts]
    content = [
        [digest, captions.get(verdict.filename)]
        for verdict, digest in zip(verdicts, digests, strict=True)
        if digest
    ]
    made = SubjectSet(
        id=new_id("set"),
        owner=owner,
        name=name,
        class_noun=class_noun,
        digest=canonical_digest({"class_noun": class_noun, "images": content}),
        created_at=time.time(),
    )
    try:
        _put(blobs, verdicts)
        with db.session() as session:
            hold_blobs(session)
            _put(blobs, verdicts)  # writes only what a deletion has taken since
            session.add(made)
            session.flush()
            session.add_all(
                SubjectImage(
                    set_id=made.id,
                    position=position,
                    filename=verdict.filename,
                    verdict="accepted" if verdict.accepted else "refused",
                    reason=verdict.reason,
                    warnings=verdict.warnings,
                    sha256=digest,
                    width=verdict.width,
                    height=verdict.height,
                    caption=captions.get(verdict.filename) if digest else None,
                )
                for position, (verdict, digest) in enumerate(zip(verdicts, digests, strict=True))
            )
    except BaseException:
        delete_unused(db, blobs, [digest for digest in digests if digest])
        raise
    return made


def _put(blobs: BlobStore, verdicts: Iterable[Verdict]) -> None:
    for verdict in verdicts:
        if verdict.accepted:
            blobs.put(verdict.png)
