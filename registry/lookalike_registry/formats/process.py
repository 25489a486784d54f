"""Exporting and importing in a process of its own, for those who run without torch. Torch-free.

    python -m lookalike_registry.formats '{"do": "export" | "import", …}'

It says in JSON what it wrote, or what problem there was.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lookalike_platform.errors import CapabilityMissing, FieldProblem, InvalidRequest

PROBLEM = 3
"""Exit code of a process that says a problem."""
_SECONDS = 1800.0  # a full denoiser's matrices by SVD: minutes on SD 1.5


@dataclass(frozen=True)
class Exported:
    """What was written; left_out: of a change made thin, ||dW - B A|| / ||dW||."""

    paths: list[Path]
    left_out: float


@dataclass(frozen=True)
class About:
    """What an imported file cannot say of itself; see `LoraCard`."""

    title: str
    family: str
    resolution: int
    trigger: str
    prediction_type: str
    class_noun: str


def export_apart(
    adapter: Path,
    base: Path,
    form: str,
    family: str,
    folder: Path,
    rank: int | None,
    cache: Path,
) -> Exported:
    """Write the files of a format into the folder; see `export.export`.

    Raises what it raises, and CapabilityMissing if the process ended without a word or took long.
    """
    said = _run(
        do="export",
        adapter=str(adapter),
        base=str(base),
        form=form,
        family=family,
        folder=str(folder),
        rank=rank,
        cache=str(cache),
    )
    return Exported([folder / name for name in said["files"]], said["left_out"])


def import_apart(files: Sequence[Path], base: Path, about: About, folder: Path) -> tuple[str, Path]:
    """The method and our file, in the folder, of a foreign adapter that fits the base.

    Raises what `load.load` raises, and CapabilityMissing if the process ended without a word.
    """
    said = _run(
        do="import",
        files=[str(file) for file in files],
        base=str(base),
        about=asdict(about),
        folder=str(folder),
    )
    return said["method"], folder / said["file"]


def _run(**order: Any) -> Mapping[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lookalike_registry.formats", json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CapabilityMissing(
            f"The {order['do']} was not done in {_SECONDS / 60:.0f} minutes on the API's machine, "
            "and was given up. Dense changes are made into a LoRA by SVD: `model` needs none but "
            "for SVDiff, whose factors of the base are kept, so that another try gets further."
        ) from error
    if done.returncode not in (0, PROBLEM):
        last = done.stderr.strip().rpartition("\n")[2]
        raise CapabilityMissing(f"The {order['do']} ended with code {done.returncode}: {last}")
    said: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    if done.returncode == PROBLEM:
        kinds = {kind.slug: kind for kind in (InvalidRequest, CapabilityMissing)}
        fields = [FieldProblem(*field) for field in said["fields"]]
        raise kinds[said["slug"]](said["detail"], fields)
    return said
