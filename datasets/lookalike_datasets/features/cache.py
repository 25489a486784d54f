"""Tensors on disk under a key that names everything they were computed from.

A changed photo, size or encoder is another key: nothing is ever stale, only unused.
"""

from pathlib import Path

import torch
from safetensors.torch import load, save

from lookalike_platform.files import atomic_write, canonical_digest, sha256_file


def key_of(**parts: object) -> str:
    """The key of a value that `parts` (JSON) decide."""
    return canonical_digest(parts)


def read(folder: Path, key: str) -> dict[str, torch.Tensor] | None:
    """What is kept under `key`; None if nothing, or nothing whole."""
    path = _file(folder, key)
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        return None
    except Exception:  # safetensors raises its own errors for files cut short by a full disk
        path.unlink(missing_ok=True)
        return None


def write(folder: Path, key: str, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    atomic_write(_file(folder, key), save(contiguous))


def component_digest(folder: Path) -> str:
    """Digest of one part of a base (its config and weights): the encoder's name in keys."""
    files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json"})
    return canonical_digest([[p.name, sha256_file(p)] for p in files])


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"
