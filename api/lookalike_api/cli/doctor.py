"""`lookalike doctor`: is everything here that the settings ask for, and if not, what to do."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import typer

from lookalike_api.cli.output import AsJson, show, table
from lookalike_api.cli.settings import read_settings
from lookalike_platform.errors import LookalikeError
from lookalike_platform.settings import Settings

GIB = 2**30
ROLES = {
    "api": ["fastapi", "python-multipart", "uvicorn"],
    "worker": ["mlflow"],
    "torch": ["accelerate", "deepspeed", "diffusers", "peft", "safetensors", "transformers"],
}
MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}

# Run by a process of its own: this one stays free of torch, and outlives a broken library.
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "threads": torch.get_num_threads(),
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    "cuda": cuda,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
}))
"""
DEEPSPEED_PROBE = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
print(json.dumps({"version": deepspeed.__version__, "device": get_accelerator().device_name()}))
"""


@dataclass(frozen=True)
class Finding:
    """What a check saw, and what to do unless all is well."""

    about: str
    status: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""


Check = Callable[[Settings], Iterable[Finding]]


def doctor(as_json: AsJson = False) -> None:
    """Check everything Lookalike depends on, and say what to do about what is missing."""
    settings = read_settings()
    findings = [finding for check in CHECKS for finding in carry_out(check, settings)]
    healthy = all(finding.status != "failed" for finding in findings)
    answer = {"healthy": healthy, "checks": [asdict(finding) for finding in findings]}
    rows = (
        (MARKS[f.status], f.about, f"{f.detail}\n→ {f.remedy}" if f.remedy else f.detail)
        for f in findings
    )
    show(answer, as_json, lambda: table(("", "", ""), rows, ""))
    if not healthy:
        raise typer.Exit(1)


def python(settings: Settings) -> Iterator[Finding]:
    yield Finding("Python", "ok", sys.version.split()[0])
    if sys.platform != "linux":
        yield Finding(
            "platform",
            "warning",
            f"{sys.platform}: only Linux ends trainers together with a worker that was killed",
            "after a crash, look for left-over processes",
        )


def packages(settings: Settings) -> Iterator[Finding]:
    for role, names in ROLES.items():
        have, lack = [], []
        for name in names:
            try:
                have.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                lack.append(name)
        if lack:
            remedy = f"pip install 'lookalike[{role}]' where this machine is to be used for it"
            yield Finding(f"packages: {role}", "warning", f"no {', '.join(lack)}", remedy)
        else:
            yield Finding(f"packages: {role}", "ok", ", ".join(have))


def torch(settings: Settings) -> Iterator[Finding]:
    try:
        seen = _probe(TORCH_PROBE)
    except RuntimeError as error:
        yield Finding("torch", "failed", str(error), "pip install 'lookalike[torch]'")
        return
    devices = ", ".join(seen["devices"]) or f"CPU, {seen['threads']} threads"
    yield Finding("torch", "ok", f"{seen['version']} on {devices}")
    if settings.device == "cuda" and not seen["cuda"]:
        yield Finding(
            "device",
            "failed",
            "LOOKALIKE_DEVICE is cuda, and torch sees no GPU",
            "install the GPU's driver and a CUDA build of torch, or set LOOKALIKE_DEVICE=auto",
        )
    if not seen["gloo"]:
        remedy = "install torch from PyPI or pytorch.org"
        yield Finding("torch", "failed", "built without gloo: no multi-process training", remedy)


def deepspeed(settings: Settings) -> Iterator[Finding]:
    try:
        seen = _probe(DEEPSPEED_PROBE)
    except RuntimeError as error:
        yield Finding("DeepSpeed", "failed", str(error), "pip install 'lookalike[torch]'")
        return
    yield Finding("DeepSpeed", "ok", f"{seen['version']} on {seen['device']}")


def database(settings: Settings) -> Iterator[Finding]:
    from lookalike_platform.db.engine import head_revision, schema_revision

    shown = _without_password(settings.database_url)
    try:
        revision = schema_revision(settings.database_url)
    except Exception as error:
        yield Finding(
            "database",
            "failed",
            f"{shown} does not answer: {_first_line(error)}",
            "start it, or correct LOOKALIKE_DATABASE_URL",
        )
        return
    head = head_revision()
    if revision == head:
        yield Finding("database", "ok", f"{shown} at revision {revision}")
    elif revision is None:
        remedy = "lookalike migrate (lookalike up does it too)"
        yield Finding("database", "warning", f"{shown} has no tables yet", remedy)
    else:
        detail = f"{shown} is at revision {revision}, this version needs {head}"
        yield Finding("database", "failed", detail, "lookalike migrate")


def broker(settings: Settings) -> Iterator[Finding]:
    from kombu import Connection

    shown = _without_password(settings.broker_url)
    try:
        with Connection(settings.broker_url, connect_timeout=5) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=5)
    except Exception as error:
        yield Finding(
            "broker",
            "failed",
            f"{shown} does not answer: {_first_line(error)}",
            "start it, or correct LOOKALIKE_BROKER_URL",
        )
        return
    yield Finding("broker", "ok", shown)


def mlflow(settings: Settings) -> Iterator[Finding]:
    uri = settings.mlflow_uri
    shown = _without_password(uri)
    if not uri.startswith("http"):
        yield Finding("MLflow", "ok", f"{shown} (no server; made when first used)")
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            yield Finding("MLflow", "ok", shown)
    except (OSError, ValueError) as error:
        remedy = "start the server, or correct LOOKALIKE_MLFLOW_URI"
        yield Finding("MLflow", "failed", f"{shown} does not answer: {error}", remedy)


def blobs(settings: Settings) -> Iterator[Finding]:
    from lookalike_platform.blobs import open_blobs

    probe = b"lookalike doctor was here"
    try:
        store = open_blobs(settings)
        name = store.put(probe)
        whole = store.get(name) == probe
        store.delete(name)
    except Exception as error:
        remedy = getattr(error, "remedy", "check that it exists and may be written to")
        yield Finding("blobs", "failed", f"{settings.blob_url}: {_first_line(error)}", remedy)
        return
    if whole:
        yield Finding("blobs", "ok", f"{settings.blob_url} keeps what it is given")
    else:
        remedy = "check the disk or the bucket"
        yield Finding("blobs", "failed", f"{settings.blob_url} gives back other bytes", remedy)


def base(settings: Settings) -> Iterator[Finding]:
    from lookalike_platform.bases import resolve

    try:
        found = resolve(settings.default_base, settings)
    except LookalikeError as error:
        remedy = "choose another with LOOKALIKE_DEFAULT_BASE"
        yield Finding("base model", "failed", error.detail, remedy)
        return
    detail = f"{found.name}: {found.family}, {found.resolution} px, {found.fingerprint[:12]}"
    yield Finding("base model", "ok", detail)


def encoders(settings: Settings) -> Iterator[Finding]:
    from lookalike_trainers.evaluation.encoder_folder import check_encoders

    named = {"CLIP": settings.clip_encoder, "DINO": settings.dino_encoder}
    try:
        check_encoders(settings.clip_encoder, settings.dino_encoder)
    except LookalikeError as error:
        remedy = "see LOOKALIKE_CLIP_ENCODER and LOOKALIKE_DINO_ENCODER"
        yield Finding("judges", "failed", error.detail, remedy)
        return
    there = [f"{what} from {name}" for what, name in named.items() if name]
    yield Finding("judges", "ok", ", ".join(there) or "the base itself")


def disk(settings: Settings) -> Iterator[Finding]:
    free = shutil.disk_usage(settings.home).free / GIB
    detail = f"{free:.1f} GiB free at {settings.home}"
    if free < 1:
        remedy = f"make room; {settings.cache} may be deleted at any time"
        yield Finding("disk", "failed", detail, remedy)
    elif free < 5:
        yield Finding("disk", "warning", detail, "checkpoints of large base models take gigabytes")
    else:
        yield Finding("disk", "ok", detail)


def stack(settings: Settings) -> Iterator[Finding]:
    from lookalike_api.stack import find_stack

    url = find_stack(settings)
    detail = f"runs at {url}" if url else "does not run (lookalike up starts it)"
    yield Finding("embedded stack", "ok", detail)


CHECKS: list[Check] = [
    python,
    packages,
    torch,
    deepspeed,
    database,
    broker,
    mlflow,
    blobs,
    base,
    encoders,
    disk,
    stack,
]


def carry_out(check: Check, settings: Settings) -> Iterator[Finding]:
    """A check that breaks is a finding too: the others still run."""
    try:
        yield from check(settings)
    except Exception as error:
        yield Finding(
            check.__name__,
            "failed",
            f"the check itself failed: {type(error).__name__}: {_first_line(error)}",
            "see whether the packages are complete: scripts/install does it again",
        )


def _probe(code: str) -> dict[str, Any]:
    """Run Python code that prints one JSON object as its last line. Raises RuntimeError."""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"code {ran.returncode}"])[-1])
    seen: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return seen


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.partition(':')[0]}@{tail}" if at else url


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
