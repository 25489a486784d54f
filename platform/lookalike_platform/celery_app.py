"""The Celery application: how jobs' messages travel. What they mean is in the database.

Run a worker with `lookalike worker`, or with Celery's own command line:
`celery -A lookalike_platform.celery_app worker --pool=threads --concurrency=1 -Q train`, and
`--include` the modules of the tasks.
"""

from typing import Any

from celery import Celery
from kombu.transport.sqlalchemy import Transport as EmbeddedTransport

from lookalike_platform.jobs.states import QUEUES
from lookalike_platform.settings import Settings, get_settings

TASKS = {queue: f"lookalike.{kind}" for kind, queue in QUEUES.items()}
"""Queue → the task its messages call, with one argument: the job's id."""


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's configuration for our broker and our way of working."""
    return {
        "broker_url": settings.broker_url,
        "broker_transport_options": _transport_options(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker outlives any outage of the broker
        # A job's lease makes its work safe, so a message has done its duty once it is received:
        # no redelivery after RabbitMQ's consumer timeout or Redis' visibility timeout.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],  # no pickle
        "task_routes": {task: {"queue": queue} for queue, task in TASKS.items()},
        "timezone": "UTC",
        "enable_utc": True,
        "worker_hijack_root_logger": False,
        "worker_soft_shutdown_timeout": settings.stop_grace_seconds,
    }


def make_app(settings: Settings) -> Celery:
    """An application on the broker of `settings`."""
    made = Celery("lookalike", set_as_current=False)
    made.config_from_object(configuration(settings))
    return made


def send_with(sender: Celery, job_id: str, queue: str) -> None:
    """Give the broker a job's message, without retrying: the relay tries again."""
    sender.send_task(TASKS[queue], args=[job_id], queue=queue, retry=False)


def _transport_options(settings: Settings) -> dict[str, Any]:
    scheme = settings.broker_url.partition(":")[0]
    if scheme.startswith("redis"):
        return {"visibility_timeout": 12 * 3600}
    if scheme.startswith("sqla+sqlite"):
        return {"connect_args": {"timeout": 30}}  # seconds to wait while another process writes
    return {}


# kombu's embedded transport hands out one message per poll, by default one a second. Its options
# cannot say otherwise: all of them go to SQLAlchemy's create_engine.
EmbeddedTransport.polling_interval = 0.1

app = Celery("lookalike")
# Settings are read when the configuration is first needed, not at import.
app.add_defaults(lambda: configuration(get_settings()))
