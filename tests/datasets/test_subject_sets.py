import io
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from lookalike_datasets import subject_sets
from lookalike_platform.blobs import BlobStore, LocalBlobs, open_blobs
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job, SubjectImage, SubjectSet
from lookalike_platform.errors import Conflict, InvalidRequest, NotFound
from lookalike_platform.files import sha256_bytes
from lookalike_platform.jobs.store import NewJob, submit
from lookalike_platform.settings import Settings
from support_images import encoded, photo, picture

Files = list[tuple[str, BinaryIO]]


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


def uploads(*contents: bytes) -> Files:
    return [(f"{number}.jpg", io.BytesIO(data)) for number, data in enumerate(contents)]


def create(
    database: Database,
    settings: Settings,
    files: Files | None = None,
    *,
    name: str = "teapot",
    noun: str = "teapot",
    captions: dict[str, str] | None = None,
) -> SubjectSet:
    return subject_sets.create(
        database,
        open_blobs(settings),
        "local",
        name,
        noun,
        uploads(photo(0), photo(1), photo(2)) if files is None else files,
        captions or {},
        settings,
    )


def images(database: Database, made: SubjectSet) -> list[SubjectImage]:
    with database.read_session() as session:
        return subject_sets.images(session, made.id)


def stored_files(settings: Settings) -> list[Path]:
    return [path for path in (settings.home / "blobs").rglob("*") if path.is_file()]


def refusal(database: Database, settings: Settings, **kwargs: object) -> dict[str, str]:
    """The fields of the refusal; nothing may have been stored."""
    with pytest.raises(InvalidRequest) as refused:
        create(database, settings, **kwargs)  # type: ignore[arg-type]
    assert stored_files(settings) == []
    with database.read_session() as session:
        assert session.scalars(select(SubjectSet)).all() == []
    return {field.path: field.message for field in refused.value.fields}


def test_a_set_keeps_its_photos_in_order_under_their_digests(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    made = create(database, settings, captions={"1.jpg": " a red teapot "})
    kept = images(database, made)
    assert [(image.filename, image.verdict, image.caption) for image in kept] == [
        ("0.jpg", "accepted", None),
        ("1.jpg", "accepted", "a red teapot"),
        ("2.jpg", "accepted", None),
    ]
    for image in kept:
        assert image.sha256 is not None
        data = blobs.get(image.sha256)
        assert sha256_bytes(data) == image.sha256
        assert Image.open(io.BytesIO(data)).size == (image.width, image.height)


def test_the_digest_covers_noun_order_and_captions_and_nothing_else(
    database: Database, settings: Settings
) -> None:
    photos = [photo(0), photo(1), photo(2)]
    digests = [
        create(database, settings).digest,
        create(database, settings, name="other").digest,
        create(database, settings, noun="kettle").digest,
        create(database, settings, uploads(*reversed(photos))).digest,
        create(database, settings, captions={"0.jpg": "a teapot"}).digest,
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_refused_files_are_kept_on_record_beside_the_good_ones(
    database: Database, settings: Settings
) -> None:
    made = create(database, settings, uploads(photo(0), b"text", photo(1), photo(2)))
    bad = images(database, made)[1]
    assert (bad.verdict, bad.sha256) == ("refused", None)
    assert bad.reason == "is not a JPEG, PNG or WebP picture"


def test_the_same_picture_twice_is_refused_and_an_almost_equal_one_gets_a_warning(
    database: Database, settings: Settings
) -> None:
    again = encoded(picture(0), "PNG")
    almost = encoded(picture(0).resize((90, 75)), quality=60)
    made = create(
        database, settings, uploads(again, photo(1), photo(2), again + b"trailing", almost)
    )
    *_, same, near = images(database, made)
    assert (same.verdict, same.reason) == ("refused", "is the same picture as 0.jpg")
    assert (near.verdict, near.warnings) == ("accepted", ["looks almost like 0.jpg"])


def test_too_few_good_photos_are_refused_with_a_verdict_for_each_bad_file(
    database: Database, settings: Settings
) -> None:
    files = uploads(photo(0), b"text", photo(0), photo(1))
    assert refusal(database, settings, files=files) == {
        "images[1]": "1.jpg: is not a JPEG, PNG or WebP picture",
        "images[2]": "2.jpg: is the same picture as 0.jpg",
    }


@pytest.mark.parametrize("count", [0, 1, 500])
def test_a_wrong_number_of_files_is_refused_before_any_is_read(
    database: Database, settings: Settings, count: int
) -> None:
    class Unread(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise AssertionError("was read")

    files: Files = [(f"{number}.jpg", Unread()) for number in range(count)]
    fields = refusal(database, settings, files=files)
    assert fields["images"].startswith(f"{count} files; at ")


@pytest.mark.parametrize(
    "name", ["", "Teapot", "-teapot", "tea pot", "tea_pot", "a" * 64, "a/b", "..", "théière"]
)
def test_a_name_that_is_no_token_is_refused(
    database: Database, settings: Settings, name: str
) -> None:
    assert list(refusal(database, settings, name=name)) == ["name"]


@pytest.mark.parametrize("noun", ["", " dog", "dog2", "a" * 41, "dog\n", "<dog>", "dog, cat"])
def test_a_class_noun_that_is_no_noun_is_refused(
    database: Database, settings: Settings, noun: str
) -> None:
    assert list(refusal(database, settings, noun=noun)) == ["class_noun"]


@pytest.mark.parametrize("noun", ["dog", "stuffed animal", "jack-in-the-box", "théière", "茶壶"])
def test_nouns_of_several_words_and_other_languages_are_taken(
    database: Database, settings: Settings, noun: str
) -> None:
    assert create(database, settings, noun=noun).class_noun == noun


def test_wrong_captions_are_refused(database: Database, settings: Settings) -> None:
    fields = refusal(
        database,
        settings,
        captions={"9.jpg": "whose?", "0.jpg": "x" * 2001, "1.jpg": "two\nlines", "2.jpg": "\ud800"},
    )
    assert list(fields) == [f"captions.{number}.jpg" for number in (9, 0, 1, 2)]


def test_a_failing_transaction_leaves_no_blobs_but_those_of_other_sets(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create(database, settings)
    before = stored_files(settings)
    monkeypatch.setattr(subject_sets, "new_id", lambda prefix: made.id)
    with pytest.raises(IntegrityError):
        create(database, settings, uploads(photo(0), photo(3), photo(4)))
    assert stored_files(settings) == before


def test_a_full_disk_leaves_no_blobs(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, taken = LocalBlobs.put, []

    def filling(self: LocalBlobs, data: bytes) -> str:
        if len(taken) == 2:
            raise OSError("No space left on device")
        taken.append(put(self, data))
        return taken[-1]

    monkeypatch.setattr(LocalBlobs, "put", filling)
    with pytest.raises(OSError, match="No space"):
        create(database, settings)
    assert len(taken) == 2
    assert stored_files(settings) == []


def test_another_owners_set_is_not_found(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    made = create(database, settings)
    with database.read_session() as session:
        assert subject_sets.get(session, "local", made.id).digest == made.digest
        with pytest.raises(NotFound):
            subject_sets.get(session, "someone", made.id)
        assert subject_sets.list_sets(session, "someone") == ([], None)
    with pytest.raises(NotFound):
        subject_sets.delete(database, blobs, "someone", made.id)


def test_sets_are_listed_newest_first_in_pages(database: Database, settings: Settings) -> None:
    made = [create(database, settings, name=f"set-{number}").id for number in range(5)]
    pages, cursor = [], None
    with database.read_session() as session:
        while True:
            page, cursor = subject_sets.list_sets(session, "local", cursor=cursor, limit=2)
            pages.append([row.id for row in page])
            if cursor is None:
                break
        with pytest.raises(InvalidRequest, match="not a cursor"):
            subject_sets.list_sets(session, "local", cursor="nonsense")
    assert pages == [[made[4], made[3]], [made[2], made[1]], [made[0]]]


def test_deleting_a_set_keeps_the_photos_another_set_has(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    one = create(database, settings)
    other = create(database, settings, uploads(photo(0), photo(3), photo(4)))
    own = {image.sha256 for image in images(database, one)}
    shared = {image.sha256 for image in images(database, other)}
    subject_sets.delete(database, blobs, "local", one.id)
    for digest in own | shared:
        assert digest is not None
        assert blobs.exists(digest) == (digest in shared)
    assert images(database, one) == []
    subject_sets.delete(database, blobs, "local", other.id)
    assert stored_files(settings) == []


def test_a_set_is_kept_while_an_unfinished_job_uses_it(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    made = create(database, settings)
    with database.session() as session:
        new = NewJob(
            owner="local",
            kind="train",
            base_model="tiny",
            base_fingerprint="f",
            request={},
            subject_set_id=made.id,
        )
        job = submit(session, new)
    with pytest.raises(Conflict, match=job.id):
        subject_sets.delete(database, blobs, "local", made.id)
    with database.session() as session:
        found = session.get(Job, job.id)
        assert found is not None
        found.state = "succeeded"
    subject_sets.delete(database, blobs, "local", made.id)
    with database.read_session() as session:
        found = session.get(Job, job.id)
        assert found is not None
        assert found.subject_set_id is None
