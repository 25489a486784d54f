"""The way to MLflow. It is imported inside functions: that takes seconds, and the API needs none.

MLflow is a mirror for people who look at experiments; the project's database is the truth.
"""

import contextlib
import logging
import os
import random
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy.engine import make_url

from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import AdapterAlias
from lookalike_platform.errors import CapabilityMissing
from lookalike_platform.settings import Settings

EXPERIMENT = "lookalike"
TRIES = 10
"""How often a call that lost a race in MLflow is made, at random intervals."""
_log = logging.getLogger(__name__)


def mlflow_client(settings: Settings) -> Any:
    """An `mlflow.MlflowClient` for `settings.mlflow_uri`; its database is made when first used.

    Raises:
        CapabilityMissing: mlflow is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise CapabilityMissing(
            "Registering adapters needs MLflow: pip install 'lookalike[worker]'"
        ) from error
    if settings.mlflow_uri.startswith("sqlite:"):
        _make_database(settings.mlflow_uri, MlflowClient)
    return MlflowClient(tracking_uri=settings.mlflow_uri, registry_uri=settings.mlflow_uri)


def _make_database(uri: str, client: Any) -> None:
    """Makes MLflow's SQLite file whole or not at all.

    MLflow migrates it for seconds in many steps, and refuses for ever what a process that was
    killed meanwhile left half-way.
    """
    target = Path(make_url(uri).database or "")
    if target.name in ("", ":memory:") or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="mlflow-", dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        client(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(fresh, target)


def experiment_id(client: Any, settings: Settings) -> str:
    """The one experiment all runs are in, made if it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # A server decides itself where artifacts go; a bare database keeps them under `home`.
        served = settings.mlflow_uri.startswith("http")
        folder = None if served else (settings.home / "mlflow").absolute().as_uri()
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=folder))
        except MlflowException as error:
            if not already_exists(error):
                raise
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)


def model_name(owner: str, concept: str) -> str:
    return f"{owner}.{concept}"


def already_exists(error: Any) -> bool:
    return bool(error.error_code == "RESOURCE_ALREADY_EXISTS")


def delete_mirrored(client: Any, name: str, version: str) -> None:
    """Deletes a version in MLflow, and its aliases; one that is gone already is no error."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def mirror_alias(db: Database, client: Any, owner: str, concept: str, alias: str) -> None:
    """Makes MLflow's alias what the database says, also when that changes meanwhile.

    MLflow asks whether an alias is there and then inserts it, which fails when two do so at once.
    """
    from mlflow.exceptions import MlflowException

    def truth() -> int | None:
        with db.read_session() as session:
            row = session.get(AdapterAlias, (owner, concept, alias))
            return row.version if row else None

    name = model_name(owner, concept)
    failures = 0
    version = truth()
    while True:
        try:
            if version is None:
                client.delete_registered_model_alias(name, alias)
            else:
                client.set_registered_model_alias(name, alias, str(version))
        except MlflowException:
            failures += 1
            if failures == TRIES:
                raise
            time.sleep(random.uniform(0.01, 0.2))
            continue
        version, mirrored = truth(), version
        if version == mirrored:
            return


def warm(settings: Settings) -> threading.Thread:
    """Imports MLflow and prepares its database while something else takes the time.

    What goes wrong here goes wrong again, and is told, when a version is registered.
    """

    def prepare() -> None:
        try:
            experiment_id(mlflow_client(settings), settings)
        except Exception:
            _log.warning("MLflow could not be prepared ahead of time", exc_info=True)

    thread = threading.Thread(target=prepare, name="warm-mlflow", daemon=True)
    thread.start()
    return thread
