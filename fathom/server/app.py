"""The application: routes of all dialects, the page, the guards before them; and the process that serves it."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fathom.errors import FathomError, InputError
from fathom.server import anthropic_api, openai_api
from fathom.server.failures import Failure, failure_of, render
from fathom.server.guards import Guards
from fathom.server.metrics import CONTENT_TYPE, Metrics
from fathom.server.service import Generates, Service
from fathom.server.settings import ServerSettings
from fathom.server.tasks import Context

__all__ = ["ServerSettings", "create_app", "listen", "serve"]

VERSION = "0.1.0"


class Health(BaseModel):
    """Whether the server works, and whether it takes new requests."""

    status: Literal["ok", "loading", "draining", "failed"]
    running: int
    waiting: int


class Version(BaseModel):
    """Of this program."""

    version: str


def create_app(service: Service | Generates, settings: ServerSettings = ServerSettings()) -> FastAPI:
    """The application for an engine, or for a service that the caller keeps; it is started and stopped with the application."""
    service = service if isinstance(service, Service) else Service(service)
    context = Context(service, settings, Metrics(settings.model_name, lambda: service.stats))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="Fathom", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.context = context
    for router in (_watching, openai_api.router, anthropic_api.router):
        app.include_router(router(context))
    page = files("fathom.server") / "web"
    app.mount("/", StaticFiles(directory=page, html=True))
    for error in (Failure, FathomError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, _answer_error)
    app.openapi = lambda: _describe(app)
    public = {"/health", "/", *(f"/{path.relative_to(page).as_posix()}" for path in Path(str(page)).rglob("*") if path.is_file())}
    app.add_middleware(Guards, settings=settings, metrics=context.metrics, public=frozenset(public))
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; InputError for an unusable address."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except (OSError, OverflowError) as error:
        words = os.strerror(error.errno) if getattr(error, "errno", 0) and error.errno > 0 else str(error)
        raise InputError(f"cannot listen on {host}:{port}: {words}; choose another --port or --host") from error


def serve(engine: Generates, settings: ServerSettings, listener: socket.socket, console: Console) -> None:
    """Serve until a signal stops it: the first lets running requests finish, a second does not."""
    app = create_app(engine, settings)
    server = _Server(uvicorn.Config(app, http="httptools", ws="none", log_config=None, access_log=False, server_header=False,
                                    timeout_keep_alive=65, timeout_graceful_shutdown=2))
    host, port = listener.getsockname()[:2]
    console.print(f"serving {settings.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)",
                  soft_wrap=True, highlight=False, markup=False)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Drains before it shuts down."""

    def handle_exit(self, sig: int, frame: object) -> None:
        context: Context = self.config.app.state.context
        if context.service.draining or self.should_exit:
            self.should_exit = self.force_exit = True
            return
        context.service.begin_drain()
        asyncio.run_coroutine_threadsafe(self._drain(context), context.service.loop)

    async def _drain(self, context: Context) -> None:
        await context.service.drained(context.settings.drain_seconds)
        self.should_exit = True


def _watching(context: Context) -> APIRouter:
    """Routes for those who run the server."""
    routes, service = APIRouter(tags=["server"]), context.service

    def health(code_draining: int) -> Response:
        status = "failed" if service.failed else "draining" if service.draining else "ok" if service.ready else "loading"
        body = Health(status=status, running=service.stats.running, waiting=service.stats.waiting)
        return JSONResponse(body.model_dump(), {"ok": 200, "failed": 503}.get(status, code_draining))

    @routes.get("/health", response_model=Health, responses={503: {"model": Health, "description": "The engine has failed"}})
    async def alive() -> Response:
        """Whether the process works; open to everyone."""
        return health(code_draining=200)

    @routes.get("/ready", response_model=Health, responses={503: {"model": Health, "description": "Loading, draining or failed"}})
    async def ready() -> Response:
        """Whether new requests are taken."""
        return health(code_draining=503)

    @routes.get("/version")
    async def version() -> Version:
        """Of this program."""
        return Version(version=VERSION)

    @routes.get("/metrics", response_class=Response,
                responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}})
    async def metrics() -> Response:
        """Counters, gauges and histograms."""
        return Response(context.metrics.render(), media_type=CONTENT_TYPE)

    return routes


def _describe(app: FastAPI) -> dict:
    """The OpenAPI document: as FastAPI makes it, without its own validation error, which is a 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


async def _answer_error(request: Request, error: Exception) -> Response:
    failure = failure_of(error, request.app.state.context.settings.retry_after)
    status, headers, body = render(failure, request.url.path)
    return Response(body, status, headers)
