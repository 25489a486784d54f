"""What a run says, as the worker passes it on."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lookalike_platform.blobs import open_blobs
from lookalike_platform.db.engine import Database
from lookalike_platform.errors import TrainingFailed
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.hold import held
from lookalike_platform.settings import Settings
from lookalike_trainers.following import follow
from lookalike_trainers.launcher import start
from support_jobs import look, submit


def followed(
    database: Database, settings: Settings, folder: Path, said: list[dict[str, Any]]
) -> tuple[bool, list[tuple[str, dict[str, Any]]]]:
    """Whether the run completed, and the job's events besides its states."""
    job_id = submit(database)
    lease = leases.claim(database, job_id, "worker", 30)
    assert lease is not None
    lines = "".join(json.dumps(message) + "\n" for message in said)
    running = start(
        folder, [sys.executable, "-c", f"print({lines!r}, end='')"], env=dict(os.environ)
    )
    with held(database, lease) as hold:
        blobs = open_blobs(settings)
        complete = follow(database, blobs, lease, hold, running, settings, TrainingFailed)
    events = [(e.type, e.payload) for e in look(database, job_id).events if e.type != "state"]
    return complete, events


def test_validation_pictures_become_blobs_and_events_that_name_them(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    picture = tmp_path / "step-000010.png"
    picture.write_bytes(b"a picture")
    validation = {"type": "validation", "step": 10, "prompt": "a sks dog", "file": str(picture)}
    done = {"type": "done", "outcome": "complete"}
    complete, events = followed(database, settings, tmp_path, [validation, done])
    assert complete
    ((kind, payload),) = events
    assert (kind, payload["step"], payload["prompt"]) == ("image", 10, "a sks dog")
    assert open_blobs(settings).get(payload["sha256"]) == b"a picture"


def test_a_run_that_stops_early_says_so_to_the_jobs_owner(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    message = {"type": "message", "level": "info", "text": "The loss has levelled off"}
    done = {"type": "done", "outcome": "complete"}
    _, events = followed(database, settings, tmp_path, [message, done])
    assert events == [("message", {"text": "The loss has levelled off"})]


def test_a_run_that_ends_without_a_word_has_failed(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match="said nothing"):
        followed(database, settings, tmp_path, [])
