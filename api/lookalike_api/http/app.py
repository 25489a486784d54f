"""The HTTP API: `create_app(settings)` puts its parts together. Imports no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from lookalike_api.http import (
    adapters,
    catalog,
    compositions,
    evaluations,
    generations,
    health,
    images,
    imports,
    jobs,
    openapi,
    problems,
    subject_sets,
)
from lookalike_api.http.body_limit import BodyLimit
from lookalike_api.http.context import Context
from lookalike_api.sampling.direct import Caller
from lookalike_platform.blobs import open_blobs
from lookalike_platform.celery_app import make_app, send_with
from lookalike_platform.db.engine import migrate, open_database
from lookalike_platform.jobs.keeper import Keeper
from lookalike_platform.settings import Settings, get_settings

JSON_BYTES = 2**20  # of any body that is not an upload
FORM_BYTES = 2**20  # of what a form holds beside its files

UPLOADS = (subject_sets.router.prefix, imports.router.prefix, images.router.prefix)

ROUTERS = [
    subject_sets.router,
    jobs.router,
    adapters.router,
    imports.router,
    images.router,
    generations.router,
    evaluations.router,
    compositions.router,
    catalog.router,
    health.router,
]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the database, blobs and broker of `settings` (left out: the environment's).

    While it runs it keeps the tables up to date and the keeper going: jobs accepted here are sent
    to the broker from here.
    """
    settings = settings or get_settings()
    url = settings.database_url
    db = open_database(url)
    send = partial(send_with, make_app(settings))
    keeper = Keeper(db, send, settings)
    caller = Caller(settings.sampler_url) if settings.sampler_url else None
    context = Context(settings, db, open_blobs(settings), keeper, caller)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(migrate, url)
        keeper.start()
        yield
        await run_in_threadpool(keeper.stop)
        if caller:
            caller.close()
        db.close()

    app = FastAPI(
        title="Lookalike",
        version="1",
        description="Learn a subject from a few photos and paint it anywhere.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app)
    openapi.describe(app)
    app.add_middleware(
        BodyLimit,
        limit=JSON_BYTES,
        by_path=dict.fromkeys(UPLOADS, settings.max_upload_bytes + FORM_BYTES),
    )
    return app
