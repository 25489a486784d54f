"""Settings: environment variables `LOOKALIKE_*`, every one with an embedded default."""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where things are and how large they may get. URLs left empty mean the embedded part."""

    model_config = SettingsConfigDict(env_prefix="LOOKALIKE_", extra="ignore", frozen=True)

    home: Path = Path.home() / ".lookalike"
    """Everything the embedded stack keeps: databases, blobs, caches, runs, MLflow's folder."""

    database_url: str = ""
    """SQLAlchemy URL of the project's database. Embedded: SQLite in WAL mode under `home`."""

    broker_url: str = ""
    """Celery broker: redis:// or amqp://. Embedded: kombu's SQLAlchemy transport on SQLite."""

    mlflow_uri: str = ""
    """MLflow tracking and registry URI. Embedded: SQLite and a local artifact folder."""

    blob_url: str = ""
    """Where images and adapter files are kept: file:///… or s3://bucket/prefix."""

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8760, ge=1, le=65535)

    owner: str = "local"
    """The one owner of everything until API keys name others."""

    default_base: str = "pocket-64"

    # Subject sets
    min_images: int = Field(default=3, ge=1)
    max_images: int = Field(default=30, ge=1)
    min_image_side: int = Field(default=64, ge=1)
    max_image_side: int = Field(default=8192, ge=64)
    max_image_bytes: int = 20 * 2**20
    max_upload_bytes: int = 256 * 2**20

    # Jobs
    lease_seconds: float = Field(default=30.0, gt=0)
    reap_seconds: float = Field(default=5.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    stop_grace_seconds: float = Field(default=30.0, gt=0)

    # Training and sampling processes
    num_processes: int = Field(default=1, ge=1)
    zero_stage: int = Field(default=0, ge=0, le=3)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_prompt_characters: int = 2000
    max_wait_seconds: float = 120.0

    # Sampling
    sample_concurrency: int = Field(default=32, ge=1)
    """Generations that a sampling worker has in hand at once, for its sampler to batch."""

    sampler_url: str = ""
    """http://host:port where the sampling worker listens and the API calls it, so that a generation
    does not wait for the broker to tell. Left empty, the broker alone tells."""

    batch_pixels: int | None = Field(default=None, ge=1)
    """Pixels of pictures that one call of the denoiser serves. None: as many as the device's memory
    is thought to hold (sampling/batch_size.py)."""

    max_queued: int = Field(default=1000, ge=1)
    max_queued_per_owner: int = Field(default=200, ge=1)
    """Generations that may wait; one more is refused, with when to come again."""

    adapter_host_bytes: int = Field(default=2**30, ge=1)
    """Adapters in the memory of a sampler, in bytes; those unused for longest make room."""

    adapter_device_bytes: int = Field(default=2**29, ge=1)
    """The same in the memory of its GPU, if it has one."""

    # Evaluation: a folder, or a hub id that is in the hub's local cache
    clip_encoder: str | None = None
    """Judges prompts, and subjects too: openai/clip-vit-base-patch32 is the papers'."""

    dino_encoder: str | None = None
    """Judges subjects: facebook/dino-vits16 is the papers'. With neither the base judges itself."""

    @model_validator(mode="after")
    def _embedded_defaults(self) -> "Settings":
        home = self.home.expanduser().absolute()
        defaults = {
            "home": home,
            "database_url": f"sqlite:///{home}/lookalike.db",
            "broker_url": f"sqla+sqlite:///{home}/broker.db",
            "mlflow_uri": f"sqlite:///{home}/mlflow.db",
            "blob_url": f"file://{home}/blobs",
        }
        for name, value in defaults.items():
            if name == "home" or not getattr(self, name):
                object.__setattr__(self, name, value)
        return self

    @property
    def runs(self) -> Path:
        """One folder per training job: its request, checkpoints, progress and results."""
        return self.home / "runs"

    @property
    def cache(self) -> Path:
        """Everything that may be deleted at rest: latents, text features, prior images."""
        return self.home / "cache"


@cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    settings = Settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    return settings
