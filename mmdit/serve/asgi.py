"""The server as an application for whoever listens in its place: it loads the model when it begins."""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from mmdit.common.command import say
from mmdit.serve.app import loaded, make_app
from mmdit.serve.asking import Front
from mmdit.serve.keys import Keys
from mmdit.serve.metrics import Metrics
from mmdit.serve.options import ServeOptions
from mmdit.serve.studio import Studio

_TICK = 0.05  # seconds


class Served:
    """An ASGI application, with its lifespan: it has begun when the model is loaded, and ends as the server does."""

    def __init__(self, options: ServeOptions) -> None:
        """Raises SettingsError for keys that cannot be read."""
        metrics = Metrics()
        self._grace = options.grace
        self.studio = Studio(lambda: loaded(options), options.queue, metrics)
        self._app = make_app(Front(options, self.studio, metrics), Keys(options.api_key_file), say)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        self.studio.start()
        while not self.studio.loaded and self.studio.failed is None:
            await asyncio.sleep(_TICK)
        if self.studio.failed is not None:
            await send({"type": "lifespan.startup.failed", "message": str(self.studio.failed)})
            return
        await send({"type": "lifespan.startup.complete"})
        told: Any = await receive()
        assert told["type"] == "lifespan.shutdown"
        self.studio.stop()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        while self.studio.busy and loop.time() < until:
            await asyncio.sleep(_TICK)
        self.studio.close()
        await send({"type": "lifespan.shutdown.complete"})
