"""What the doctor finds, and what it says to do."""

import sys
from pathlib import Path

import pytest

from lookalike_api.cli import doctor
from lookalike_api.cli.doctor import Finding
from lookalike_platform.db.engine import migrate
from lookalike_platform.settings import Settings, get_settings
from support_cli import runner

NOBODY = "127.0.0.1:9"


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_the_embedded_installation_is_healthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    get_settings.cache_clear()
    monkeypatch.setenv("LOOKALIKE_HOME", str(tmp_path))
    ran = runner(monkeypatch, capsys)("doctor", "--json")
    get_settings.cache_clear()
    assert ran.code == 0
    assert ran.json["healthy"]
    about = {check["about"]: check for check in ran.json["checks"]}
    assert {"torch", "DeepSpeed", "database", "broker", "MLflow", "blobs", "base model"} <= set(
        about
    )
    assert about["database"]["remedy"].startswith("lookalike migrate")
    assert "torch" not in sys.modules or "torch" in about["torch"]["about"]


def test_a_sick_installation_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    get_settings.cache_clear()
    monkeypatch.setenv("LOOKALIKE_HOME", str(tmp_path))
    monkeypatch.setenv("LOOKALIKE_BROKER_URL", f"redis://{NOBODY}")
    monkeypatch.setattr(doctor, "CHECKS", [doctor.broker])
    ran = runner(monkeypatch, capsys)("doctor")
    get_settings.cache_clear()
    assert ran.code == 1
    assert "LOOKALIKE_BROKER_URL" in ran.out


def test_a_migrated_database_is_at_its_revision(settings: Settings) -> None:
    migrate(settings.database_url)
    assert only(list(doctor.database(settings))).status == "ok"


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://ann:secret@{NOBODY}/none"
    finding = only(list(doctor.database(Settings(home=tmp_path, database_url=url))))
    assert finding.status == "failed"
    assert "ann" in finding.detail
    assert "secret" not in finding.detail
    assert "LOOKALIKE_DATABASE_URL" in finding.remedy


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (doctor.mlflow, {"mlflow_uri": f"http://{NOBODY}"}),
        (doctor.base, {"default_base": "none"}),
        (doctor.encoders, {"dino_encoder": "nobody/no-encoder"}),
        (doctor.broker, {"broker_url": f"amqp://guest:guest@{NOBODY}//"}),
        (doctor.blobs, {"blob_url": "file:///proc/none"}),
    ],
)
def test_what_is_missing_is_a_failure_with_a_remedy(
    check: doctor.Check, values: dict[str, str], tmp_path: Path
) -> None:
    finding = only(list(check(Settings(home=tmp_path, **values))))
    assert finding.status == "failed"
    assert finding.remedy


def test_a_check_that_breaks_is_a_finding(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Settings) -> list[Finding]:
        raise ImportError("no module named libfoo")

    finding = only(list(doctor.carry_out(broken, settings)))
    assert finding.status == "failed"
    assert "libfoo" in finding.detail
