"""Registration: from a finished run's files to one numbered version of a concept.

    blobs → run → params → metrics → artifacts → model → version → row → alias

Every step may be repeated: it finds what an earlier try left and goes on from there. So a job
that is registered again, after a crash between any two steps, still has exactly one version.
"""

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lookalike_platform.blobs import BlobStore
from lookalike_platform.db.engine import Database
from lookalike_platform.db.locks import hold_blobs
from lookalike_platform.db.tables import AdapterAlias, AdapterVersion
from lookalike_platform.errors import Conflict, InvalidRequest
from lookalike_platform.files import sha256_file
from lookalike_platform.settings import Settings
from lookalike_registry.manifest import Manifest
from lookalike_registry.mlflow_client import (
    TRIES,
    already_exists,
    delete_mirrored,
    experiment_id,
    mirror_alias,
    mlflow_client,
    model_name,
)

CANDIDATE = "candidate"
GRID_NAME = "samples.png"
STEPS = (
    "blobs", "run", "params", "metrics", "artifacts", "model", "version", "row", "alias",
)  # fmt: skip
_ARTIFACTS = "adapter"
_JOB_TAG = "lookalike.job_id"
_BATCH = 500  # MLflow takes up to 1,000 metrics a call


def register(
    db: Database,
    blobs: BlobStore,
    settings: Settings,
    manifest: Manifest,
    files: Mapping[str, Path],
    metrics: Sequence[Mapping[str, float]],
    on_step: Callable[[str], None] = lambda step: None,
) -> AdapterVersion:
    """Makes the run's adapter a version of its concept, with the alias `candidate`.

    Args:
        files: what goes beside `manifest.json`, by name; the weights as `manifest.weights.file`.
        metrics: one mapping a step, `{"step": 10, "loss": 0.1, …}`; `time`, seconds since the
            epoch, is optional.
        on_step: called with each name of `STEPS` when that step is done.

    Raises:
        InvalidRequest: the weights are missing or not those of the manifest.
        Conflict: MLflow counts versions anew, so it is not the one used before.
        CapabilityMissing: mlflow is not installed.
    """
    identity = manifest.identity
    _check_files(manifest, files)
    client = mlflow_client(settings)
    with db.read_session() as session:
        row = _registered(session, identity.job_id)
    if row is None:
        _put_blobs(blobs, manifest, files)
        on_step("blobs")
        run = _run(client, settings, manifest)
        on_step("run")
        _log_params(client, run, manifest)
        on_step("params")
        _log_metrics(client, run, metrics)
        on_step("metrics")
        _log_artifacts(client, run, manifest, files)
        on_step("artifacts")
        name = model_name(identity.owner, identity.concept)
        _ensure_model(client, name)
        on_step("model")
        number = _ensure_version(client, name, run, manifest)
        on_step("version")
        row = _insert(db, blobs, manifest, files, name, number, run.info.run_id)
        on_step("row")
    mirror_alias(db, client, identity.owner, identity.concept, CANDIDATE)
    on_step("alias")
    return row


def _registered(session: Session, job_id: str) -> AdapterVersion | None:
    return session.scalar(select(AdapterVersion).where(AdapterVersion.job_id == job_id))


def _check_files(manifest: Manifest, files: Mapping[str, Path]) -> None:
    weights = manifest.weights.file
    if weights not in files:
        raise InvalidRequest(f"There are no weights to register: {weights} is missing.")
    digest = sha256_file(files[weights])
    if digest != manifest.weights.sha256:
        raise InvalidRequest(
            f"The weights are not those of the manifest: {digest} instead of"
            f" {manifest.weights.sha256}."
        )


def _put_blobs(blobs: BlobStore, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """The weights, and the sample grid where the manifest names one."""
    blobs.put_file(files[manifest.weights.file])
    if manifest.evaluation.sample_grid is not None:
        digest = blobs.put_file(files[GRID_NAME])
        if digest != manifest.evaluation.sample_grid:
            raise InvalidRequest(f"{GRID_NAME} is not the sample grid of the manifest.")


def _run(client: Any, settings: Settings, manifest: Manifest) -> Any:
    experiment = experiment_id(client, settings)
    job_id = manifest.identity.job_id
    found = client.search_runs(
        [experiment],
        f"tags.`{_JOB_TAG}` = '{job_id}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if found:
        return found[0]
    name = f"{manifest.identity.concept} {job_id}"
    return client.create_run(experiment, tags=manifest.to_tags(), run_name=name)


def _log_params(client: Any, run: Any, manifest: Manifest) -> None:
    from mlflow.entities import Param

    values = {
        "method": manifest.identity.method,
        "base": manifest.base.name,
        "class_noun": manifest.prompting.class_noun,
        "world_size": manifest.lineage.world_size,
        "zero_stage": manifest.lineage.zero_stage,
        **manifest.lineage.config,
    }
    # MLflow refuses to change a parameter, and an operator may change settings between two tries.
    known = client.get_run(run.info.run_id).data.params
    params = [Param(key, _text(value)) for key, value in values.items() if key not in known]
    client.log_batch(run.info.run_id, params=params)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _log_metrics(client: Any, run: Any, metrics: Sequence[Mapping[str, float]]) -> None:
    from mlflow.entities import Metric

    # Points are equal to MLflow when value, step and time are: a second try adds none.
    points = [
        Metric(
            key,
            float(value),
            int(record["time"] * 1000) if "time" in record else run.info.start_time,
            int(record["step"]),
        )
        for record in metrics
        for key, value in record.items()
        if key not in ("step", "time") and math.isfinite(value)
    ]
    for start in range(0, len(points), _BATCH):
        client.log_batch(run.info.run_id, metrics=points[start : start + _BATCH])


def _log_artifacts(client: Any, run: Any, manifest: Manifest, files: Mapping[str, Path]) -> None:
    run_id = run.info.run_id
    with tempfile.TemporaryDirectory(prefix="lookalike-register-") as folder:
        staged = Path(folder, _ARTIFACTS)
        staged.mkdir()
        for name, path in files.items():
            (staged / name).symlink_to(path.resolve())
        (staged / "manifest.json").write_text(manifest.model_dump_json(indent=2))
        client.log_artifacts(run_id, str(staged), _ARTIFACTS)
        back = Path(folder, "back")
        back.mkdir()
        weights = manifest.weights.file
        kept = client.download_artifacts(run_id, f"{_ARTIFACTS}/{weights}", str(back))
        if sha256_file(Path(kept)) != manifest.weights.sha256:
            raise OSError(f"MLflow's artifact store changed {weights} of run {run_id}")
    client.set_terminated(run_id, "FINISHED")


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if not already_exists(error):
            raise


def _ensure_version(client: Any, name: str, run: Any, manifest: Manifest) -> int:
    """MLflow's number of this job's version, made if it is not there.

    MLflow takes the highest number plus one and gives up when others were faster three times.
    Should two workers register one job at once, both keep the lower number.
    """
    from mlflow.exceptions import MlflowException

    job_id = manifest.identity.job_id
    for last_try in [False] * (TRIES - 1) + [True]:
        found = client.search_model_versions(f"name = '{name}' and tags.`{_JOB_TAG}` = '{job_id}'")
        if found:
            break
        try:
            client.create_model_version(
                name,
                source=f"{run.info.artifact_uri}/{_ARTIFACTS}",
                run_id=run.info.run_id,
                tags=manifest.to_tags(),
            )
        except MlflowException:
            if last_try:
                raise
            time.sleep(random.uniform(0.01, 0.2))
    kept, *surplus = sorted(found, key=lambda version: int(version.version))
    for version in surplus:
        delete_mirrored(client, name, str(version.version))
    for key, value in manifest.to_tags().items():
        if kept.tags.get(key) != value:  # an earlier try had other weights
            client.set_model_version_tag(name, str(kept.version), key, value)
    return int(kept.version)


def _insert(
    db: Database,
    blobs: BlobStore,
    manifest: Manifest,
    files: Mapping[str, Path],
    name: str,
    number: int,
    run_id: str,
) -> AdapterVersion:
    identity = manifest.identity
    with db.session() as session:
        hold_blobs(session)
        row = _registered(session, identity.job_id)
        if row is not None:  # another worker was faster
            return row
        _refuse_taken_number(session, identity.owner, identity.concept, number)
        if not blobs.exists(manifest.weights.sha256):  # deleted meanwhile with an equal version
            _put_blobs(blobs, manifest, files)
        row = AdapterVersion(
            id=identity.id,
            owner=identity.owner,
            concept=identity.concept,
            version=number,
            job_id=identity.job_id,
            method=identity.method,
            base_fingerprint=manifest.base.fingerprint,
            digest=manifest.weights.sha256,
            manifest=manifest.model_dump(mode="json"),
            mlflow_model=name,
            mlflow_version=str(number),
            mlflow_run_id=run_id,
            created_at=time.time(),
        )
        session.add(row)
        alias = session.get(AdapterAlias, (identity.owner, identity.concept, CANDIDATE))
        if alias is None:
            session.add(
                AdapterAlias(
                    owner=identity.owner,
                    concept=identity.concept,
                    alias=CANDIDATE,
                    version=number,
                )
            )
        else:
            alias.version = max(alias.version, number)
    return row


def _refuse_taken_number(session: Session, owner: str, concept: str, number: int) -> None:
    taken = session.scalar(
        select(AdapterVersion.job_id).where(
            AdapterVersion.owner == owner,
            AdapterVersion.concept == concept,
            AdapterVersion.version == number,
        )
    )
    if taken is not None:
        raise Conflict(
            f"MLflow gave the number {number} of {concept}, which job {taken} has here: it is not"
            " the MLflow used before. Point LOOKALIKE_MLFLOW_URI at that one."
        )
