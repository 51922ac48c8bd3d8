"""The server of `mmdit.serve` as a deployment of Ray Serve: replicas on many machines, as many as requests need.

    serve run mmdit.ray:app model=stable-diffusion-3.5-medium max_replicas=8

Ray's proxies listen and choose a replica; each is the whole server, with its own model, its own queue and its own
metrics. Whoever is too many waits at the proxy, and beyond `waiting` is told to come again.
"""

from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve import Application  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig, BackpressureConfig  # pyright: ignore[reportMissingImports]

from mmdit.ray.options import ClusterOptions, options_of
from mmdit.serve.asgi import Served

_COME_AGAIN = 5.0  # seconds of Retry-After; a replica that is full itself tells its own by the pace of steps


class Replica:
    """What Ray Serve keeps alive."""

    app: Served  # that of `serve.ingress`

    def check_health(self) -> None:
        if self.app.studio.failed is not None:
            raise RuntimeError(str(self.app.studio.failed))


def app(arguments: dict[str, Any]) -> Application:
    """Build the application. arguments: options of the server and of its replicas. Raises SettingsError."""
    options = options_of(arguments)

    def server() -> Served:  # is called in each replica
        return Served(options)

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
