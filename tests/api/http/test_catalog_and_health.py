from pathlib import Path

import pytest

from lookalike_platform.celery_app import configuration
from lookalike_platform.db.engine import schema_revision
from lookalike_platform.jobs import lease as leases
from lookalike_platform.samplers import SAMPLERS
from lookalike_platform.settings import Settings
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.method_configs import LoraConfig
from support_api import Api, problem_of, serving
from support_databases import skip_or_fail


def test_base_models_tell_their_family_fingerprint_and_sizes(api: Api) -> None:
    [base] = api.http.get("/v1/base-models").json()["items"]
    assert (base["name"], base["family"], base["default"]) == ("pocket-64", "sd2", True)
    assert (base["resolution"], base["side_multiple"], base["max_tokens"]) == (64, 16, 32)
    assert len(base["fingerprint"]) == 64


def test_methods_bring_the_schema_of_their_config(api: Api) -> None:
    methods = api.http.get("/v1/methods").json()["items"]
    assert [method["name"] for method in methods] == [method.name for method in METHODS]
    assert methods[0]["config"] == LoraConfig.model_json_schema()


def test_samplers_are_listed_by_name(api: Api) -> None:
    samplers = api.http.get("/v1/samplers").json()["items"]
    assert [sampler["name"] for sampler in samplers] == list(SAMPLERS)


def test_readiness_tells_of_database_broker_and_work(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
    wanted = {"method": "lora", "subject_set": api.add_set()["id"]}
    running = api.http.post("/v1/jobs", json=wanted).json()["id"]
    leases.claim(api.context.db, running, "worker-1", 60)
    api.http.post("/v1/jobs", json=wanted).raise_for_status()
    ready = api.http.get("/readyz").json()
    assert ready["schema_revision"] == schema_revision(api.settings.database_url)
    assert ready["queues"]["train"]["queued"] == 1
    assert ready["queues"]["train"]["workers"] == ["worker-1"]
    assert ready["queues"]["sample"]["queued"] == 0


@pytest.mark.parametrize(
    "broker", ["redis://127.0.0.1:6379/9", "amqp://guest:guest@127.0.0.1:5672//"]
)
def test_real_brokers_are_asked_too(tmp_path: Path, broker: str) -> None:
    settings = Settings(home=tmp_path, broker_url=broker)
    with serving(settings) as api:
        answer = api.http.get("/readyz")
        if answer.status_code == 503:
            skip_or_fail(broker.partition(":")[0], answer.json()["detail"])
        assert answer.json()["broker"] == broker.partition(":")[0]


def test_a_broker_that_is_away_is_503_while_jobs_are_still_accepted(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, broker_url="redis://127.0.0.1:1/0")
    assert configuration(settings)["broker_url"] == "redis://127.0.0.1:1/0"
    with serving(settings) as api:
        assert "broker" in problem_of(api.http.get("/readyz"), 503)["detail"]
        wanted = {"method": "lora", "subject_set": api.add_set()["id"]}
        assert api.http.post("/v1/jobs", json=wanted).status_code == 202
