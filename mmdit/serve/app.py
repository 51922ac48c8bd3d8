"""The server: its routes together, and how it begins and ends."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from mmdit.common.command import give, say
from mmdit.common.errors import SettingsError
from mmdit.driver.pipeline import USER_ERRORS, Pipeline
from mmdit.driver.remembered import Remembered
from mmdit.run import settle
from mmdit.serve import browser
from mmdit.serve.asking import Front
from mmdit.serve.automatic import Automatic
from mmdit.serve.guard import Guard
from mmdit.serve.keys import Keys
from mmdit.serve.logs import discreet, in_json
from mmdit.serve.metrics import Metrics
from mmdit.serve.openai import OpenAI
from mmdit.serve.options import ServeOptions
from mmdit.serve.studio import Studio

_CLOSING = 5  # seconds that answers have to be sent, at the end
_TICK = 0.05
_TEXTS = 256e6  # bytes of texts that are encoded and kept
_SHARE = 0.05  # of the budget, for them at most
_BACKLOG = 2048  # connections that wait to be taken


class State:
    """How the server is."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
        ]

    async def health(self, _: Request) -> Response:
        """200 where the process lives and may come to draw."""
        return JSONResponse({"status": "failed"}, 503) if self._front.studio.failed else JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """200 where requests are taken."""
        if self._front.studio.ready:
            return JSONResponse({"status": "ready"})
        told = "stopping" if self._front.studio.loaded else "loading"
        return JSONResponse({"status": told}, 503, {"retry-after": "5"})

    async def metrics(self, _: Request) -> Response:
        text = self._front.metrics.text(self._front.studio.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def make_app(front: Front, keys: Keys, log: Callable[[str], object] = say) -> Guard:
    """All routes. More of an interface is a further list of them here."""
    routes = [*State(front).routes(), *OpenAI(front).routes(), *Automatic(front).routes(), *browser.routes()]
    router = Router(routes, redirect_slashes=False)
    return Guard(router, front.options, keys, front.metrics, frozenset(route.path for route in routes), log)


class Server(uvicorn.Server):
    """Listens, and ends so that nobody waits for an answer that does not come."""

    def __init__(
        self,
        options: ServeOptions,
        load: Callable[[], Pipeline] | None = None,
        log: Callable[[str], object] = say,
    ) -> None:
        """load: gives the pipeline, if not by the options. Raises SettingsError for keys that cannot be read."""
        keys, metrics = Keys(options.api_key_file), Metrics()
        self.studio = Studio(load or (lambda: loaded(options)), options.queue, metrics)
        app = make_app(Front(options, self.studio, metrics), keys, log)
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                loop="asyncio",
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_CLOSING,
            )
        )
        self._grace = options.grace

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.studio.start()
        try:
            await super().serve(sockets)
        finally:
            self.studio.close()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.studio.failed is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, let what is being drawn be done if it is soon enough, then close."""
        self.studio.stop()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        while self.studio.busy and loop.time() < until and not self.force_exit:
            await asyncio.sleep(_TICK)
        self.studio.close()
        await super().shutdown(sockets)


def loaded(options: ServeOptions) -> Pipeline:
    pipeline = Pipeline.from_settings(options.settings)
    pipeline.remembered = Remembered(min(_TEXTS, _SHARE * pipeline.budget(options.memory)))
    discreet(pipeline)
    settle()
    return pipeline


def listening(options: ServeOptions) -> socket.socket:
    """A socket at the address of the options; SettingsError where it cannot be had."""
    found = None
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        if found is not None:
            found.close()
        raise SettingsError(f"cannot listen at {options.host}:{options.port}: {error.strerror or error}") from None
    return found


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(options: ServeOptions) -> None:
    """Be the server until a signal ends it; SettingsError where it cannot begin."""
    server = Server(options)
    with listening(options) as listener, in_json(say):
        give(address_of(listener))
        server.run([listener])
    failed = server.studio.failed
    if isinstance(failed, USER_ERRORS):
        raise SettingsError(str(failed)) from failed
    if failed is not None:
        raise failed
