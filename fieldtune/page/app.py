"""The page's server: NiceGUI's pages, pictures, `/metrics` and `/healthz`, guarded by `fieldtune.page.access`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from importlib.util import find_spec

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from nicegui import ui

from bridge.backend import UInt8
from bridge.config import ConfigError
from bridge.endpoint import is_local
from fieldtune.page import episodes, learning, player, robots, versions
from fieldtune.page.access import Access
from fieldtune.page.config import PageConfig
from fieldtune.page.health import health
from fieldtune.page.view import RunView, jpeg
from runtime.durable import write_atomic
from runtime.episode_file import EpisodeError

PORTS = 10  # tried from the configured one on, on loopback
NO_METRICS = "needs the package `prometheus_client`; pip install 'fieldtune[metrics]'\n"


def make_app(view: RunView) -> Access:
    """The whole application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    # Names are parameters, not parts of the path: they come from outside and may have a slash.
    @app.get("/camera.jpg")
    async def camera(client: str, camera: str) -> Response:
        return await _picture(lambda: view.running.look()[client].images[camera], live=True)

    @app.get("/frame.jpg")
    async def frame(episode: str, at: int, camera: str) -> Response:
        return await _picture(lambda: view.picture(episode, at, camera), live=False)

    @app.get("/healthz")
    async def healthz() -> Response:
        code, body = health(await asyncio.to_thread(view.status))
        return JSONResponse(body, code)

    @app.get("/metrics")
    async def metrics() -> Response:
        if find_spec("prometheus_client") is None:
            return Response(NO_METRICS, 501, media_type="text/plain")
        from fieldtune.page.prometheus import CONTENT_TYPE, exposition

        now, trainer = await asyncio.to_thread(view.status), await asyncio.to_thread(view.trainer)
        return Response(exposition(now, trainer), headers={"Content-Type": CONTENT_TYPE})

    for each in (robots, versions, learning, episodes, player):
        each.register(view)
    ui.run_with(app, title="fieldtune", dark=None, show_welcome_message=False)
    return Access(app, view.deployment.page)


async def _picture(find: Callable[[], UInt8], *, live: bool) -> Response:
    """A picture as JPEG. What was logged never changes, what is live is gone at once."""
    try:
        image = await asyncio.to_thread(find)
    except (LookupError, EpisodeError):
        return Response("no such picture\n", 404, media_type="text/plain")
    headers = {"Cache-Control": "no-store" if live else "private, max-age=3600"}
    return Response(await asyncio.to_thread(jpeg, image), media_type="image/jpeg", headers=headers)


def serve(view: RunView, config: PageConfig, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Serve until `stopped`. The address is said, and is in the run's `page.url` meanwhile. Raises `ConfigError`."""
    app = make_app(view)
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"{'https' if config.certificate else 'http'}://{shown}:{port}"
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ssl_certfile=config.certificate,
            ssl_keyfile=config.key,
            timeout_graceful_shutdown=1,
            ws_max_size=1024 * 1024,
        )
    )
    try:
        view.run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(view.run.page_url, url.encode())
    except OSError as error:  # a full disk is no reason to be without a stop button
        say(f"{view.run.page_url} cannot be written: {error.strerror}")
    say(f"page: {url}")
    try:
        _run(server, listener, stopped)
    finally:
        # Another page of the run may have come since.
        if view.run.page_url.exists() and view.run.page_url.read_text() == url:
            view.run.page_url.unlink()
        listener.close()


def _run(server: uvicorn.Server, listener: socket.socket, stopped: Callable[[], bool]) -> None:
    async def until_stopped() -> None:
        serving = asyncio.create_task(server._serve([listener]))
        while not stopped() and not serving.done():
            await asyncio.sleep(0.2)
        server.should_exit = True
        await serving

    asyncio.run(until_stopped())


def listen(config: PageConfig) -> socket.socket:
    """A socket at the configured address; on loopback at the first free port of ten. Raises `ConfigError`."""
    local = is_local(f"tcp://{config.host}:{config.port}")
    for port in range(config.port, min(config.port + (PORTS if local else 1), 65536)):
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            return socket.create_server((config.host, port), family=family)
        except OSError as error:
            why = error.strerror or str(error)
    raise ConfigError(f"$.page.port: {config.host}:{config.port} cannot be listened on: {why}")
