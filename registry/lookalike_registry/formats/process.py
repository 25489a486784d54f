"""Exporting in a process of its own, for those who run without torch. Torch-free.

    python -m lookalike_registry.formats ADAPTER BASE_FOLDER FORMAT FAMILY OUT_FOLDER

It says in JSON which files it wrote, or what problem there was.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lookalike_platform.errors import CapabilityMissing, FieldProblem, InvalidRequest

PROBLEM = 3
"""Exit code of a process that says a problem."""
_SECONDS = 300.0


@dataclass(frozen=True)
class Files:
    """What was written; left_out: of a change made thin, ||dW - B A|| / ||dW||."""

    paths: list[Path]
    left_out: float


def export_apart(adapter: Path, base_folder: Path, form: str, family: str, folder: Path) -> Files:
    """Write the files of a format into the folder; see `export.export`.

    Raises what it raises, and CapabilityMissing if the process ended without a word.
    """
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "lookalike_registry.formats"),
            *map(str, (adapter, base_folder, form, family, folder)),
        ],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode not in (0, PROBLEM):
        last = done.stderr.strip().rpartition("\n")[2]
        raise CapabilityMissing(f"The export ended with code {done.returncode}: {last}")
    said = json.loads(done.stdout.strip().rpartition("\n")[2])
    if done.returncode == PROBLEM:
        kinds = {kind.slug: kind for kind in (InvalidRequest, CapabilityMissing)}
        fields = [FieldProblem(*field) for field in said["fields"]]
        raise kinds[said["slug"]](said["detail"], fields)
    return Files([folder / name for name in said["files"]], said["left_out"])
