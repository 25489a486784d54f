import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.errors import InvalidRequest, NotFound
from lookalike_platform.files import sha256_bytes
from lookalike_platform.settings import Settings


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 over HTTP as blobs need: PUT, GET, HEAD and DELETE of whole objects."""

    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_GET(self) -> None:
        found = self.objects.get(self.path)
        missing = b"<Error><Code>NoSuchKey</Code></Error>"
        self._answer(404, missing) if found is None else self._answer(200, found)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.objects else 404)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("boto3")
    Bucket.objects.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # Checksums in trailers need more of S3 than this bucket has.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    yield "s3://photos/some/prefix"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["local", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    url = "" if request.param == "local" else request.getfixturevalue("bucket_url")
    return open_blobs(Settings(home=tmp_path, blob_url=url))


def test_bytes_come_back_under_the_digest_of_their_content(blobs: BlobStore) -> None:
    sha256 = blobs.put(b"a photo")
    assert sha256 == sha256_bytes(b"a photo")
    assert blobs.exists(sha256)
    assert blobs.get(sha256) == b"a photo"
    assert blobs.path(sha256).read_bytes() == b"a photo"


def test_a_file_and_its_bytes_are_one_blob(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(b"a photo")
    assert blobs.put_file(tmp_path / "photo") == blobs.put(b"a photo")
    assert blobs.get(sha256_bytes(b"a photo")) == b"a photo"


def test_a_deleted_blob_is_not_found_and_may_be_deleted_again(blobs: BlobStore) -> None:
    sha256 = blobs.put(b"a photo")
    blobs.path(sha256)
    blobs.delete(sha256)
    blobs.delete(sha256)
    assert not blobs.exists(sha256)
    with pytest.raises(NotFound):
        blobs.get(sha256)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "ab", "A" * 64])
def test_what_is_not_a_digest_names_no_blob(blobs: BlobStore, name: str) -> None:
    with pytest.raises(NotFound):
        blobs.get(name)


def test_a_local_store_leaves_nothing_but_the_blob(tmp_path: Path) -> None:
    blobs = open_blobs(Settings(home=tmp_path))
    sha256 = blobs.put(b"a photo")
    files = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert files == [tmp_path / "blobs" / sha256[:2] / sha256[2:4] / sha256]


def test_a_bucket_that_was_tampered_with_is_noticed(bucket_url: str, tmp_path: Path) -> None:
    blobs = open_blobs(Settings(home=tmp_path, blob_url=bucket_url))
    sha256 = blobs.put(b"a photo")
    Bucket.objects[f"/photos/some/prefix/{sha256}"] = b"another"
    with pytest.raises(NotFound, match="content of its name"):
        blobs.path(sha256)


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "file://host/x", "/plain/folder"])
def test_other_urls_are_refused_with_what_to_write(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidRequest, match="file:///folder or s3://bucket/prefix"):
        open_blobs(Settings(home=tmp_path, blob_url=url))
