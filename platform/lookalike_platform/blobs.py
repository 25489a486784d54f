"""Blobs: bytes kept under the sha256 of their content, in a folder or an S3 bucket."""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from lookalike_platform.errors import CapabilityMissing, InvalidRequest, NotFound
from lookalike_platform.files import atomic_write, sha256_bytes, sha256_file
from lookalike_platform.settings import Settings


class BlobStore(Protocol):
    """Content-addressed storage: writing the same bytes twice is writing them once.

    `get` and `path` raise NotFound for a blob that is not there; `delete` does not mind.
    """

    def put(self, data: bytes) -> str: ...
    def put_file(self, path: Path) -> str: ...
    def get(self, sha256: str) -> bytes: ...
    def path(self, sha256: str) -> Path: ...
    def exists(self, sha256: str) -> bool: ...
    def delete(self, sha256: str) -> None: ...


def open_blobs(settings: Settings) -> BlobStore:
    """The store that `settings.blob_url` names: `file:///folder` or `s3://bucket/prefix`.

    Raises CapabilityMissing for s3 without boto3, InvalidRequest for any other URL.
    """
    url = urlsplit(settings.blob_url)
    if url.scheme == "file" and not url.netloc:
        return LocalBlobs(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        cache = LocalBlobs(settings.cache / "blobs")
        return S3Blobs(_s3_client(), url.netloc, url.path.strip("/"), cache)
    raise InvalidRequest(
        f"LOOKALIKE_BLOB_URL is {settings.blob_url!r}; write file:///folder or s3://bucket/prefix"
    )


@dataclass(frozen=True)
class LocalBlobs:
    """Blobs as files: `root/ab/cd/abcd…`."""

    root: Path

    def put(self, data: bytes) -> str:
        sha256 = sha256_bytes(data)
        if not self._file(sha256).exists():
            atomic_write(self._file(sha256), data)
        return sha256

    def put_file(self, path: Path) -> str:
        sha256 = sha256_file(path)
        place = self._file(sha256)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{sha256}.{secrets.token_hex(6)}.partial")
            try:
                shutil.copyfile(path, partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)
        return sha256

    def get(self, sha256: str) -> bytes:
        return self.path(sha256).read_bytes()

    def path(self, sha256: str) -> Path:
        place = self._file(sha256)
        if not place.is_file():
            raise NotFound(f"no blob {sha256}")
        return place

    def exists(self, sha256: str) -> bool:
        return self._file(sha256).is_file()

    def delete(self, sha256: str) -> None:
        self._file(sha256).unlink(missing_ok=True)

    def _file(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256[2:4] / _checked(sha256)


@dataclass(frozen=True)
class S3Blobs:
    """Blobs as objects `prefix/abcd…`; files asked for by path are fetched once into `cache`."""

    client: Any
    bucket: str
    prefix: str
    cache: LocalBlobs

    def put(self, data: bytes) -> str:
        sha256 = sha256_bytes(data)
        if not self.exists(sha256):
            self.client.put_object(Bucket=self.bucket, Key=self._key(sha256), Body=data)
        return sha256

    def put_file(self, path: Path) -> str:
        sha256 = sha256_file(path)
        if not self.exists(sha256):
            self.client.upload_file(str(path), self.bucket, self._key(sha256))
        return sha256

    def get(self, sha256: str) -> bytes:
        if self.cache.exists(sha256):
            return self.cache.get(sha256)
        data = self._read(sha256)
        if sha256_bytes(data) != sha256:
            raise NotFound(f"the stored blob {sha256} does not have the content of its name")
        return data

    def path(self, sha256: str) -> Path:
        if not self.cache.exists(sha256):
            self.cache.put(self.get(sha256))
        return self.cache.path(sha256)

    def exists(self, sha256: str) -> bool:
        try:
            self.client.head_object(Bucket=self.bucket, Key=self._key(sha256))
        except self.client.exceptions.ClientError as error:
            if _is_missing(error):
                return False
            raise
        return True

    def delete(self, sha256: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(sha256))
        self.cache.delete(sha256)

    def _read(self, sha256: str) -> bytes:
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(sha256))
        except self.client.exceptions.ClientError as error:
            if _is_missing(error):
                raise NotFound(f"no blob {sha256}") from None
            raise
        data: bytes = answer["Body"].read()
        return data

    def _key(self, sha256: str) -> str:
        return f"{self.prefix}/{_checked(sha256)}".lstrip("/")


def _checked(sha256: str) -> str:
    """Refuse what is not a digest before it becomes part of a path."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise NotFound(f"no blob {sha256!r}")
    return sha256


def _is_missing(error: Any) -> bool:
    return error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey", "NotFound"}


def _s3_client() -> Any:
    """Endpoint, region and credentials come from boto3's own environment (AWS_…)."""
    try:
        import boto3
    except ModuleNotFoundError:
        raise CapabilityMissing(
            "LOOKALIKE_BLOB_URL names an S3 bucket, which needs boto3: pip install 'lookalike[s3]'"
        ) from None
    return boto3.client("s3")
