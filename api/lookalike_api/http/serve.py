"""Running the API with uvicorn, so that it ends without waiting for open streams."""

import uvicorn

from lookalike_api.http.app import create_app
from lookalike_platform.settings import Settings

# Requests still running this long after the signal are cut off.
GRACE_SECONDS = 5


def serve(settings: Settings) -> None:
    """Serve on `settings.api_host` and `api_port` until SIGINT or SIGTERM."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    # uvicorn lets requests end before it tells the application; event streams end only when told.
    app.state.context.stopping = lambda: server.should_exit
    server.run()
