"""Any adapter file against the base it is for. Torch-free."""

from pathlib import Path

from lookalike_platform.blobs import BlobStore
from lookalike_platform.errors import InvalidRequest, NotFound
from lookalike_platform.files import sha256_file
from lookalike_registry.adapter_file import check_against_base
from lookalike_registry.safetensors_header import Header, read_header
from lookalike_registry.tensor_file import METHOD_KEY, check_tensors


def check_file(path: Path, base_folder: Path) -> Header:
    """Check that all of an adapter file, whatever its method, fits the base and is finite.

    Raises:
        InvalidRequest: what does not fit, one field per tensor or module.
    """
    ours = METHOD_KEY in read_header(path).metadata
    return (check_tensors if ours else check_against_base)(path, base_folder)


def registered_file(blobs: BlobStore, ref: str, digest: str) -> Path:
    """Where the weights of the version `ref` are. Raises InvalidRequest, by name, if they are gone,
    or damaged in the store."""
    try:
        return blobs.path(digest)
    except NotFound as error:
        raise InvalidRequest(
            f"{ref}: its file is gone. Restore the blobs from a backup, or train or import it "
            f"again. ({error.detail})"
        ) from error


def check_registered(path: Path, digest: str, base_folder: Path) -> Header:
    """Check that a file is the one that was registered, and what `check_file` checks."""
    if sha256_file(path) != digest:
        raise InvalidRequest("The file is damaged: it is not what was registered.")
    return check_file(path, base_folder)
