"""Checkpoints that are whole or absent.

    step-000100.partial/   being written
    step-000100/           state.safetensors, metrics.json, and manifest.json: their digests

Resuming takes the newest one whose files have the digests of its manifest. By how many processes
it was written does not matter (engine_state.py).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from lookalike_platform.files import atomic_write, sha256_file
from lookalike_trainers.engine import Engine
from lookalike_trainers.engine_state import gather, scatter

_STATE, _METRICS, _MANIFEST = "state.safetensors", "metrics.json", "manifest.json"


def write(
    engine: Engine,
    module: nn.Module,
    folder: Path,
    step: int,
    metrics: list[dict[str, float]],
    keep: int,
) -> None:
    """Write the state after `step` optimiser steps; the newest `keep` checkpoints stay.

    Every process must call it. When it returns to rank 0 the checkpoint is on the disk.
    """
    state = gather(engine, module)
    if engine.rank != 0:
        return
    place = folder / f"step-{step:06d}"
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    atomic_write(partial / _STATE, save(state))
    atomic_write(partial / _METRICS, json.dumps(metrics))
    digests = {name: sha256_file(partial / name) for name in (_STATE, _METRICS)}
    atomic_write(partial / _MANIFEST, json.dumps({"step": step, "files": digests}, indent=1))
    _sync(partial)
    shutil.rmtree(place, ignore_errors=True)
    partial.replace(place)
    _sync(folder)
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def load_newest(
    engine: Engine, module: nn.Module, folder: Path
) -> tuple[int, list[dict[str, float]]]:
    """Load the newest valid checkpoint: its step and the metrics until then; (0, []) if none."""
    found = newest_valid(folder)
    if found is None:
        return 0, []
    scatter(engine, module, load_file(found / _STATE))
    metrics = json.loads((found / _METRICS).read_text())
    return int(_manifest(found)["step"]), metrics


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint that is whole and unchanged."""
    return next((place for place in _checkpoints(folder) if _is_valid(place)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first, valid or not."""
    return sorted(folder.glob("step-??????"), key=lambda place: place.name, reverse=True)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text())
    return manifest


def _is_valid(checkpoint: Path) -> bool:
    try:
        files = _manifest(checkpoint)["files"]
        return all(sha256_file(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk, as the files' content is already."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
