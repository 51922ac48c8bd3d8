"""A list drawn by actors of Ray Data. Claims in the shared folder say what is whose, here as without Ray.

Ray Data delivers a row at least once: it starts an actor that died anew and gives it the same row again, without end
(ray 2.60 sets max_restarts and max_task_retries to -1). Here such a row comes back at once as busy, since its claim is
not yet late, and goes into the next round. So tries are counted by the claims alone, over machines and rounds, and a
picture that keeps killing actors is given up as in `mmdit.parallel.claimed`.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import ray.data  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

from mmdit.common.command import say
from mmdit.common.errors import SettingsError
from mmdit.driver.settings import Settings
from mmdit.parallel.claimed import Tally
from mmdit.parallel.claims import PATIENCE, Claims, State
from mmdit.parallel.options import two_numbers
from mmdit.parallel.shards import Part, Placed, parts_of
from mmdit.ray.actor import Painter, row_of

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}  # of ray.init
_PATIENCE = 5  # seconds, for the cluster to answer
_ROUNDS = 5  # one after another that did not get a part further, and told an error


def draw_by_ray(
    run: Settings,
    pictures: Sequence[Placed],
    largest: Settings,
    claims: Claims,
    tally: Tally,
    told: Callable[[Path], object],
) -> None:
    """Draw all pictures of a list; return when all are there or given up. told: called with every file.

    Called as a driver of the cluster (`join`). Raises SettingsError where none of its machines can draw.
    """
    left = {p.name: p for p in parts_of(pictures, run.out) if any(path is not None for _, path in p.pictures)}
    vain = 0
    while left:
        before, error = len(left), ""
        try:
            for answer in answers(run, [*left.values()], largest, claims):
                error = answer["error"] or error
                tally.failed += json.loads(answer["failed"])
                if answer["state"] == State.DONE.value and answer["part"] in left:
                    # Whoever wrote them: of a part that an actor died at, an earlier one wrote some.
                    for path in (path for _, path in left.pop(answer["part"]).pictures if path is not None):
                        if path.exists():
                            told(path)
        except BrokenPipeError:  # nobody reads the names of files
            raise
        except (RayError, OSError) as failed:  # the next round goes on
            error = str(failed).strip().splitlines()[-1]
            say(f"Ray: {error}; what is left is tried again")
        vain = vain + 1 if len(left) == before and error else 0
        if vain == _ROUNDS:
            raise SettingsError(f"no machine of the cluster draws what is left, {len(left)} parts: {error}")
        if len(left) == before:
            claims.wait()


def join(address: str) -> None:
    """Be a driver of the cluster. Raises SettingsError where there is none."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in host:  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port[:5])), _PATIENCE).close()
        ray.init(**QUIET, **more)
    except (ValueError, RuntimeError, OSError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(f"ray: no cluster at {address}: {told}") from None


def answers(run: Settings, parts: Sequence[Part], largest: Settings, claims: Claims) -> Iterable[dict[str, Any]]:
    """What became of each part, as soon as it is known."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(there.get("GPU", 0) for there in machines))
    each: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": run.ray_cores}
    fit = gpus or int(sum(there.get("CPU", 0) // run.ray_cores for there in machines))
    if not fit:
        raise SettingsError(f"ray_cores is {run.ray_cores}: no machine of the cluster has so many")
    least, most = two_numbers(run.ray_actors or "", ":") or (1, fit)
    own = {"run": told_to_actors(run), "largest": largest, "since": claims.since, "folder": os.getcwd()}
    rows = ray.data.from_items([row_of(part, run.out) for part in parts], override_num_blocks=len(parts))
    pool = ray.data.ActorPoolStrategy(
        min_size=min(least, len(parts)), max_size=min(max(least, most), len(parts)), max_tasks_in_flight_per_actor=2
    )
    what: Any = Painter  # Ray makes one in each actor, and calls that
    return rows.map(what, fn_constructor_kwargs=own, compute=pool, **each).iter_rows()


def told_to_actors(run: Settings) -> Settings:
    return replace(run, claim=run.claim or PATIENCE, out=os.path.abspath(os.path.expanduser(run.out)))
