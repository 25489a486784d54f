import os
import sys
import time
from pathlib import Path

import pytest

from lookalike_platform.celery_app import configuration, make_app, send_with
from lookalike_platform.process import spawn_group, stop_group
from lookalike_platform.settings import Settings


def test_messages_are_json_acknowledged_early_and_taken_one_at_a_time(settings: Settings) -> None:
    made = configuration(settings)
    assert made["accept_content"] == ["json"]
    assert made["task_acks_late"] is False
    assert made["worker_prefetch_multiplier"] == 1
    assert made["task_ignore_result"] is True
    assert made["worker_hijack_root_logger"] is False


def test_redis_waits_longer_than_any_outage_of_a_worker_before_it_sends_again(
    tmp_path: Path,
) -> None:
    made = configuration(Settings(home=tmp_path, broker_url="redis://localhost/0"))
    assert made["broker_transport_options"] == {"visibility_timeout": 12 * 3600}


def test_there_is_no_queue_of_another_name(settings: Settings) -> None:
    with pytest.raises(KeyError):
        send_with(make_app(settings), "job_0", "paint")


@pytest.mark.processes
def test_a_worker_on_the_embedded_broker_gets_what_is_sent_while_it_polls(
    settings: Settings,
) -> None:
    here = Path(__file__).parents[1]
    worker = "-m celery -A lookalike_platform.celery_app worker --pool=threads --concurrency=1"
    options = "-Q train,sample --include support_celery --loglevel=warning"
    log = settings.home / "worker.log"
    with log.open("wb") as output:
        celery = spawn_group(
            [sys.executable, *worker.split(), *options.split()],
            env=os.environ | {"PYTHONPATH": str(here), "LOOKALIKE_HOME": str(settings.home)},
            cwd=settings.home,
            stdout=output,
            stderr=output,
        )
        try:
            app = make_app(settings)
            sent = set()
            # Before the worker is up, and on while it polls, until it has taken the first ones.
            while len(sent) < 20 or not list(settings.home.glob("*.done")):
                assert celery.poll() is None, log.read_text()
                job_id = f"job_{len(sent)}"
                send_with(app, job_id, "train" if len(sent) % 2 else "sample")
                sent.add(job_id)
                time.sleep(0.05)
            while {path.stem for path in settings.home.glob("*.done")} != sent:
                assert celery.poll() is None, log.read_text()
                time.sleep(0.05)
        finally:
            stop_group(celery, grace=10)
    assert "Traceback" not in log.read_text()
