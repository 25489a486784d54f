"""The worker's task `lookalike.generate`: one generate job, from claim to pictures. Torch-free.

claim → preparing → sampling ─┬→ succeeded   pictures kept as blobs
                              ├→ failed      the order cannot be carried out
                              ├→ canceled    its owner asked
                              └→ queued      the worker shuts down
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from celery import signals

from lookalike_api.sampling import direct
from lookalike_api.sampling.fitting import GONE
from lookalike_api.sampling.messages import AdapterFile, Region, SampleOrder
from lookalike_api.sampling.metrics import exposition
from lookalike_api.sampling.requests import GenerateJob, PinnedAdapter, PinnedImage
from lookalike_api.sampling.service import Painted, SamplerDied, SamplerService
from lookalike_platform import bases
from lookalike_platform.blobs import BlobStore, open_blobs
from lookalike_platform.celery_app import app
from lookalike_platform.db.engine import Database
from lookalike_platform.db.tables import Job
from lookalike_platform.errors import InvalidRequest, LookalikeError, NotFound
from lookalike_platform.jobs import lease as leases
from lookalike_platform.jobs.fair import claim_fairly
from lookalike_platform.jobs.hold import Hold
from lookalike_platform.jobs.lease import Lease, LeaseLost
from lookalike_platform.jobs.work import carry_out_claimed
from lookalike_platform.jobs.worker import worker_database, worker_name
from lookalike_platform.settings import Settings, get_settings
from lookalike_registry.check import registered_file

log = logging.getLogger(__name__)

# A job fails when so many samplers died with it in a batch, or so many before it was in one.
TRIES = 2
STARTS = 5
# Steps of small models are fast: progress is written no more often than this.
PROGRESS_SECONDS = 0.25

_shutting_down = threading.Event()
# Held by the job that is made again after a sampler died with it in a batch: of those that were in
# it together, whichever was too much for it shall not take the others along again.
_suspect = threading.Lock()


@app.task(name="lookalike.generate")
def generate(job_id: str) -> None:
    """The message is a ticket (jobs/fair.py): whose turn it is may be another job's."""
    with _places():
        _serve()


def listen() -> None:
    """Take calls of the API too, if the settings say where."""
    settings = get_settings()
    if settings.sampler_url:
        direct.listen(settings.sampler_url, _called, lambda: exposition(_sampler().figures))


def _called() -> None:
    """A call of the API. While `sample_concurrency` jobs are in hand the broker's message, which
    waits for a place, is enough."""
    if not _shutting_down.is_set() and _places().acquire(blocking=False):
        try:
            _serve()
        finally:
            _places().release()


def _serve() -> None:
    """Carry out one job in this thread."""
    settings = get_settings()
    db = worker_database(settings.database_url)
    run(worker_name(), db, open_blobs(settings), settings, _sampler())


def run(
    worker: str, db: Database, blobs: BlobStore, settings: Settings, sampler: SamplerService
) -> None:
    """Carry out the generate job whose turn it is; its end is written to the database."""
    lease = claim_fairly(db, "generate", worker, settings.lease_seconds)
    if lease is None:
        return
    carry_out_claimed(
        db,
        lease,
        lambda lease, hold: _sample(db, lease, hold, blobs, settings, sampler),
        lambda what: LookalikeError(
            f"The pictures could not be made ({what}). The worker's log has the whole story."
        ),
    )


def _sample(
    db: Database,
    lease: Lease,
    hold: Hold,
    blobs: BlobStore,
    settings: Settings,
    sampler: SamplerService,
) -> dict[str, Any] | None:
    """The job's result; None if it is to stop before the pictures are ready."""
    with db.read_session() as session:
        job = session.get_one(Job, lease.job_id)
        request = GenerateJob.model_validate(job.request)
        fingerprint = job.base_fingerprint
        # One that was begun, by a worker that is lost or shut down, was begun in time.
        late_at = None if job.progress else request.deadline_seconds
        deadline = late_at and job.created_at + late_at
    # Parameters go into the pictures, pictures into blobs: the folder is only a way between.
    with tempfile.TemporaryDirectory(prefix="lookalike-") as folder:
        order = _order(request, fingerprint, blobs, settings, Path(folder))
        order = replace(order, deadline=deadline)
        leases.advance(db, lease, "sampling")
        started = time.monotonic()
        painted = _paint(order, db, lease, hold, sampler)
        if painted is None:
            return None
        digests = [blobs.put_file(path) for path in painted.images]
    return {
        "images": [
            {"seed": request.seed + number, "sha256": digest}
            for number, digest in enumerate(digests)
        ],
        "warnings": painted.warnings,
        "seconds": round(time.monotonic() - started, 3),
    }


def _order(
    request: GenerateJob,
    fingerprint: str,
    blobs: BlobStore,
    settings: Settings,
    folder: Path,
) -> SampleOrder:
    base = bases.resolve(request.base, settings)
    if base.fingerprint != fingerprint:
        raise LookalikeError(
            f"The base model {request.base} on this worker has other weights than when the job "
            "was accepted. Install the same base on API and workers, then submit it again."
        )
    negative = request.negative_prompt if request.bound_negative is None else request.bound_negative
    return SampleOrder(
        base_fingerprint=base.fingerprint,
        base_folder=base.folder,
        device=settings.device,
        adapters=_adapters(request.adapters, blobs),
        prompt=request.bound_prompt,
        negative_prompt=negative,
        guidance_scale=request.guidance_scale,
        steps=request.steps,
        sampler=request.sampler,
        seed=request.seed,
        width=request.width,
        height=request.height,
        num_images=request.num_images,
        folder=folder,
        parameters=tuple(
            request.parameters(number, fingerprint) for number in range(request.num_images)
        ),
        alone=request.deterministic,
        guidance_rescale=request.guidance_rescale,
        guidance_interval=request.guidance_interval,
        dynamic_threshold=request.dynamic_threshold,
        eta=request.eta,
        init_image=_file(request.init_image, blobs),
        strength=request.strength,
        mask_image=_file(request.mask_image, blobs),
        regions=tuple(
            Region(
                region.bound_prompt,
                _adapters(region.adapters, blobs),
                region.box,
                _file(region.mask_image, blobs),
                negative if region.bound_negative is None else region.bound_negative,
            )
            for region in request.regions
        ),
        compose=request.compose,
    )


def _adapters(adapters: list[PinnedAdapter], blobs: BlobStore) -> tuple[AdapterFile, ...]:
    return tuple(
        AdapterFile(
            one.ref,
            one.digest,
            registered_file(blobs, one.ref, one.digest),
            one.scale,
            one.word,
        )
        for one in adapters
    )


def _file(image: PinnedImage | None, blobs: BlobStore) -> Path | None:
    try:
        return blobs.path(image.sha256) if image else None
    except NotFound as error:
        raise InvalidRequest(GONE) from error


def _paint(
    order: SampleOrder, db: Database, lease: Lease, hold: Hold, sampler: SamplerService
) -> Painted | None:
    def should_stop() -> bool:
        return hold.cancel_requested or hold.lost or _shutting_down.is_set()

    on_progress = _progress_writer(db, lease)
    begun = before = 0
    with ExitStack() as held:
        while not should_stop():
            try:
                return sampler.sample(order, on_progress, should_stop)
            except SamplerDied as died:
                text = f"the sampler process died: {died}"
                leases.event(db, lease, "message", {"text": text}, "warning")
                begun, before = begun + died.begun, before + (not died.begun)
                if begun == TRIES or before == STARTS:
                    raise LookalikeError(
                        f"The sampler process died {begun + before} times ({died}), most often "
                        "because memory ran out. Ask for fewer or smaller images, and look at the "
                        "worker's log."
                    ) from died
                if died.begun and begun == 1:  # the turn is its own from here to its end
                    order = replace(order, alone=True, deadline=None)
                    _take_turn(held, should_stop)
    return None


def _take_turn(held: ExitStack, should_stop: Callable[[], bool]) -> None:
    """Wait for `_suspect`, which `held` gives back; once it is held, or on stopping, no more."""
    while not should_stop():
        if _suspect.acquire(timeout=PROGRESS_SECONDS):
            held.callback(_suspect.release)
            return


def _progress_writer(db: Database, lease: Lease) -> Callable[[int, int], None]:
    started = time.monotonic()
    written = 0.0

    def write(step: int, total: int) -> None:
        """The first steps at once: a job with progress has been begun (jobs/reaper.py)."""
        nonlocal written
        now = time.monotonic()
        if now - written < PROGRESS_SECONDS and step < total:
            return
        written = now
        rate = step / max(now - started, 1e-6)
        progress = {
            "step": step,
            "total": total,
            "steps_per_second": round(rate, 3),
            "seconds_left": round((total - step) / rate, 1),
        }
        try:
            leases.progress(db, lease, progress)
        except LeaseLost:
            raise
        except Exception:
            # The database is away for a moment: the pictures are worth more than how far they are.
            log.warning("could not write the progress of %s", lease.job_id, exc_info=True)

    return write


@cache
def _places() -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(get_settings().sample_concurrency)


@signals.worker_shutting_down.connect
def _drain(**_: object) -> None:
    _shutting_down.set()


@signals.worker_shutdown.connect
def _close(**_: object) -> None:
    """Once the jobs in hand, those of direct calls too, have gone back to the queue."""
    settings = get_settings()
    end = time.monotonic() + settings.stop_grace_seconds
    for _place in range(settings.sample_concurrency):
        if not _places().acquire(timeout=max(0.0, end - time.monotonic())):
            break
    _sampler().close()


@cache
def _sampler() -> SamplerService:
    """The worker's one sampler; started by the first job, not by the worker."""
    return SamplerService()
