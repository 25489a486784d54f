"""An evaluate job's ways to its end, in a process of its own as the worker starts it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from lookalike_datasets import subject_sets
from lookalike_platform import bases
from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.db.engine import Database, migrate, open_database
from lookalike_platform.jobs import store
from lookalike_platform.settings import Settings
from lookalike_trainers.evaluation import task
from lookalike_trainers.evaluation.request import EvaluateJob, EvaluationOptions, Pinned
from lookalike_trainers.launcher import launch_module
from support_images import photo
from support_jobs import look
from support_models import save_base
from support_sampling import save_adapter

pytestmark = pytest.mark.processes

OPTIONS = EvaluationOptions(
    prompts=["a {subject}", "{subject} at sea"], images_per_prompt=2, class_images=2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", device="cpu")


@pytest.fixture
def db(local: Settings) -> Any:
    local.home.mkdir()
    migrate(local.database_url)
    database = open_database(local.database_url)
    yield database
    database.close()


@pytest.fixture
def blobs(local: Settings) -> BlobStore:
    return open_blobs(local)


def submit(local: Settings, db: Database, blobs: BlobStore, base: Path, **changed: Any) -> str:
    known = bases.resolve(str(base), local)
    path = local.home / "adapter.safetensors"
    digest = save_adapter(path, base)
    blobs.put_file(path)
    files = [(f"{number}.jpg", BytesIO(photo(number))) for number in range(3)]
    made = subject_sets.create(db, blobs, "local", "rex", "dog", files, {}, local)
    job = EvaluateJob(
        adapters=[Pinned(id="adv_1", ref="rex@1", digest=digest)],
        method="lora",
        trigger="sks",
        called="sks dog",
        class_noun="dog",
        resolution=64,
        options=OPTIONS,
    )
    new = {
        "owner": "local",
        "kind": "evaluate",
        "subject_set_id": made.id,
        "base_model": str(base),
        "base_fingerprint": known.fingerprint,
        "request": job.model_dump(mode="json"),
    }
    with db.session() as session:
        return store.submit(session, store.NewJob(**new | changed)).id


def carry_out(local: Settings, db: Database, blobs: BlobStore, job_id: str) -> Any:
    task.run(job_id, "worker", db, blobs, local)
    return look(db, job_id)


def test_figures_of_every_measure_are_kept_with_the_judges_names(
    local: Settings, db: Database, blobs: BlobStore, base: Path
) -> None:
    known = carry_out(local, db, blobs, submit(local, db, blobs, base))
    assert known.states == ["queued", "preparing", "evaluating", "succeeded"]
    assert (known.job.progress["step"], known.job.progress["total"]) == (6, 6)
    figures = known.job.result["figures"]
    counts = {measure: figures[measure] for measure in sorted(figures)}
    assert {m: {j: f["count"] for j, f in by.items()} for m, by in counts.items()} == {
        "class_diversity": {"base-features": 1},
        "prior_drift": {"base-features": 2},
        "prompt_fidelity": {"base-classifier-2": 4},
        "real_resemblance": {"base-features": 3},
        "subject_diversity": {"base-features": 2},
        "subject_fidelity": {"base-features": 4},
    }
    assert -1 <= figures["subject_fidelity"]["base-features"]["mean"] <= 1
    assert not (local.runs / known.job.id).exists()


def test_an_encoder_that_is_not_here_fails_the_job_with_what_to_do(
    local: Settings, db: Database, blobs: BlobStore, base: Path
) -> None:
    named = local.model_copy(update={"dino_encoder": "nobody/no-encoder"})
    known = carry_out(named, db, blobs, submit(local, db, blobs, base))
    assert known.job.state == "failed"
    assert "hf download nobody/no-encoder" in known.job.error["detail"]


def test_without_its_subject_set_a_job_fails_before_anything_is_painted(
    local: Settings, db: Database, blobs: BlobStore, base: Path
) -> None:
    known = carry_out(local, db, blobs, submit(local, db, blobs, base, subject_set_id=None))
    assert known.job.state == "failed"
    assert "upload photos" in known.job.error["detail"]


def test_an_evaluation_that_is_told_to_stop_ends_at_the_next_picture(
    local: Settings, db: Database, blobs: BlobStore, base: Path, tmp_path: Path
) -> None:
    job_id = submit(local, db, blobs, base)
    request = task.evaluation_request(db, job_id, blobs, local)
    running = launch_module("lookalike_trainers.evaluation.process", request, tmp_path)
    (tmp_path / "stop").touch()
    said = list(running.messages())
    assert said[-1] == {"type": "done", "outcome": "stopped"}
    assert not [message for message in said if message["type"] == "progress"]
    assert not (tmp_path / "result.json").exists()
