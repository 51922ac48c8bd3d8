"""The server of `mmdit.serve` as a deployment of Ray Serve: replicas on many machines, as many as requests need.

    serve run mmdit.ray:app model=stable-diffusion-3.5-medium max_replicas=8

Ray's proxies listen and choose a replica; each is the whole server, with its own model, its own queue and its own
metrics. Whoever is too many waits at the proxy, and beyond `waiting` is told to come again.
"""

import asyncio
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve import Application  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig, BackpressureConfig  # pyright: ignore[reportMissingImports]
from starlette.types import Message, Receive, Scope, Send

from mmdit.common.command import say
from mmdit.ray.options import ClusterOptions, options_of
from mmdit.serve.app import loaded, make_app
from mmdit.serve.asking import Front
from mmdit.serve.keys import Keys
from mmdit.serve.metrics import Metrics
from mmdit.serve.studio import Studio

_TICK = 0.05  # seconds
_COME_AGAIN = 5.0  # seconds of Retry-After; a replica that is full itself tells its own by the pace of steps


class Server:
    """An ASGI application that loads its model when it begins; Ray Serve takes no requests before."""

    def __init__(self, options: ClusterOptions) -> None:
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
        while True:
            message: Message = await receive()
            if message["type"] == "lifespan.startup":
                self.studio.start()
                while not self.studio.loaded and self.studio.failed is None:
                    await asyncio.sleep(_TICK)
                failed = self.studio.failed
                told: dict[str, Any] = {"type": "lifespan.startup.complete"}
                await send(told if failed is None else {"type": "lifespan.startup.failed", "message": str(failed)})
            elif message["type"] == "lifespan.shutdown":
                self.studio.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


class Replica:
    """What Ray Serve keeps alive."""

    app: Server  # that of `serve.ingress`

    def check_health(self) -> None:
        if self.app.studio.failed is not None:
            raise RuntimeError(str(self.app.studio.failed))


def app(arguments: dict[str, Any]) -> Application:
    """Build the application. arguments: options of the server and of its replicas. Raises SettingsError."""
    options = options_of(arguments)

    def server() -> Server:  # is called in each replica
        return Server(options)

    scale = AutoscalingConfig(
        min_replicas=options.min_replicas, max_replicas=options.max_replicas, target_ongoing_requests=options.target
    )
    deployment = serve.deployment(
        name="mmdit",
        ray_actor_options={"num_cpus": options.cores, "num_gpus": _gpus(options)},
        autoscaling_config=scale,
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_COME_AGAIN),
        graceful_shutdown_timeout_s=float(options.grace),
        health_check_period_s=5.0,
    )(serve.ingress(server)(Replica))
    return deployment.bind()


def _gpus(options: ClusterOptions) -> int:
    if options.gpus is not None:
        return options.gpus
    there = ray.cluster_resources() if ray.is_initialized() else {}
    return 1 if options.device != "cpu" and there.get("GPU") else 0
