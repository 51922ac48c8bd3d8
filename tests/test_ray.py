"""Many machines by Ray: an actor's answers, without Ray; then, where it is installed, a cluster whose machines die."""

import asyncio
import importlib.util
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.loading import load_parts
from mmdit.driver.prompts import Folders
from mmdit.driver.settings import Settings
from mmdit.parallel.claims import Claims
from mmdit.parallel.shards import Part, part_name, parts_of
from mmdit.ray import actor
from mmdit.ray.actor import Painter, row_of
from mmdit.ray.options import options_of

MISSING = [name for name in ("ray", "pyarrow", "fastapi") if importlib.util.find_spec(name) is None]
with_ray = pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `ray`: no {', '.join(MISSING)}")
DEFAULTS = {"width": 32, "height": 16, "steps": 1, "cfg": 4.5, "t5_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("ray"), defaults=DEFAULTS)


# ---- an actor, without Ray -------------------------------------------------------------------------


@pytest.fixture
def patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is no actor, and stays where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(actor, "hush", lambda: None)
    monkeypatch.setattr(actor, "_PAUSE", 0)


def asked(model: Path, folder: Path, **more: Any) -> tuple[Settings, Part]:
    """A run, and a part of a list of it, as the driver has them."""
    run = Settings(model=str(model), dtype="fp32", device="cpu", out=str(folder), claim=50, prompts="list.txt")
    base = replace(run, prompts=None, claim=None, **more)
    parts = load_parts(base)
    (part,) = parts_of(Folders().placed([parts.check(replace(base, prompt="a horse", seed=3))]), run.out)
    return run, part


@pytest.mark.usefixtures("patch")
def test_an_actor_draws_what_a_row_asks_for(model: Path, tmp_path: Path) -> None:
    """Once; what another has is busy, what is there is done."""
    run, part = asked(model, tmp_path, negative="a bear", also=("x:0.5",), sampler="heun", cfg_interval="0:0.5")
    claims = Claims(tmp_path, 50)
    painter = Painter(run, part.pictures[0][0], claims.since, str(tmp_path))
    other = claims.take(part.name)
    assert painter(row_of(part, run.out))["state"] == "busy"
    other.release()  # type: ignore[union-attr]
    answer = painter(row_of(part, run.out))
    assert answer == {"part": part.name, "state": "done", "failed": "[]", "error": ""}
    written = (tmp_path / "a-horse-3.png").stat().st_mtime_ns
    assert painter(row_of(part, run.out)) == answer
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*.png")] == [written]


@pytest.mark.usefixtures("patch")
def test_what_goes_wrong_is_a_row(model: Path, tmp_path: Path) -> None:
    """A machine that would draw other pictures, and one that has no model."""
    run, part = asked(model, tmp_path)
    painter = Painter(run, part.pictures[0][0], 0.0, str(tmp_path))
    answer = painter({**row_of(part, run.out), "part": "0" * 24})
    assert answer["state"] == "error" and "would be others on this machine" in answer["error"]
    lost = Painter(run, replace(part.pictures[0][0], model=str(tmp_path / "none")), 0.0, "/no folder")
    assert lost(row_of(part, run.out))["state"] == "error" and not [*tmp_path.glob("*.png")]


@pytest.mark.usefixtures("patch")
def test_an_actor_that_fails_at_everything_draws_nothing_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part it gets: the others' rows are not given up by it."""
    run, part = asked(model, tmp_path)
    painter = Painter(run, part.pictures[0][0], 0.0, str(tmp_path))

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(actor, "draw", failing)
    pictures = [replace(part.pictures[0][0], seed=seed) for seed in range(20)]
    parts = [Part(part_name([s], run.out), [(s, tmp_path / f"a-horse-{s.seed}.png")]) for s in pictures]
    answers = [painter(row_of(one, run.out)) for one in parts]
    assert [answer["state"] for answer in answers] == ["done"] * 15 + ["error"] * 5
    assert sum(len(json.loads(answer["failed"])) for answer in answers) == 16


def test_options_of_a_deployment() -> None:
    """Words and what a config file holds; mistakes are one line."""
    options = options_of({"model": "x", "max_replicas": "4", "queue": 70, "compile": "true", "lora": ["a", "b:0.5"]})
    assert (options.model, options.max_replicas, options.queue, options.compile) == ("x", 4, 70, True)
    assert options.lora == ("a", "b:0.5") and options_of({"lora": "a"}).lora == ("a",)
    for given, error in (
        ({"port": "1"}, "no option 'port'"),
        ({"max_replicas": "many"}, "max_replicas is 'many': expected a whole number"),
        ({"min_replicas": "2"}, "min_replicas is 2: expected at most max_replicas, 1"),
        ({"host": "0.0.0.0"}, "expected --api-key-file"),
        ({"dtype": "fp64"}, "dtype is 'fp64'"),
    ):
        with pytest.raises(SettingsError, match=error):
            options_of(given)


def test_an_application_begins_with_its_model_and_ends(tmp_path: Path) -> None:
    """As a server that listens in its place tells it; what cannot be loaded is told in its turn."""
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    from mmdit.serve.asgi import Served

    async def lived(served: Served) -> list[str]:
        said: list[Any] = []
        told = iter(["startup", "shutdown"])

        async def receive() -> dict[str, str]:
            return {"type": f"lifespan.{next(told)}"}

        async def send(message: Any) -> None:
            said.append(message)

        await served({"type": "lifespan"}, receive, send)
        return [message["type"].removeprefix("lifespan.") for message in said]

    served = Served(options_of({"device": "cpu"}))
    assert asyncio.run(lived(served)) == ["startup.complete", "shutdown.complete"]
    assert served.studio.loaded and not served.studio.ready
    none = Served(options_of({"device": "cpu", "model": str(tmp_path / "none")}))
    assert asyncio.run(lived(none)) == ["startup.failed"]


# ---- with Ray --------------------------------------------------------------------------------------


@with_ray
@pytest.mark.filterwarnings("ignore")
def test_a_list_outlives_its_machines(tmp_path: Path) -> None:
    """Three nodes: actors and one node are killed, a row kills its actor twice, another raises."""
    from benchmarks.cluster import PIT, TRAP, by_ray

    found = by_ray(tmp_path, 24, kills=(0.2, 0.6))
    assert (found.lost, found.twice, found.strange) == ([], 0, [])
    assert found.given_up == [PIT, TRAP] and (found.killed, found.nodes) == (2, 1)


@with_ray
@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmdit.run import main

    (tmp_path / "list.txt").write_text("a horse")
    told = ["--prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path), "--ray", "127.0.0.1:1", "--device", "cpu"]
    assert main(told) == 2
    assert "error: ray: no cluster at 127.0.0.1:1" in capsys.readouterr().err


PORT = 18437


def ask(path: str, said: Any = None) -> tuple[int, Any]:
    data = None if said is None else json.dumps(said).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, None


def until(done: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def replicas(mark: str) -> set[int]:
    """Processes that serve, of the cluster that was begun with this mark in its environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if b"ray::ServeReplica" in name and mark.encode() in environment:
            found.add(int(process.name))
    return found


@with_ray
@pytest.mark.filterwarnings("ignore")
def test_a_killed_replica_is_replaced_and_a_queue_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import serve

    from mmdit.ray import app
    from mmdit.ray.lists import QUIET

    mark = f"MMDIT_TEST_{os.getpid()}"
    monkeypatch.setenv(mark, "1")
    said = {"prompt": "a horse", "size": "64x48", "steps": 1, "seed": 5}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, **QUIET)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(app({"device": "cpu", "dtype": "fp32", "ongoing": "1", "waiting": "1"}), route_prefix="/")
        status, first = ask("/v1/images/generations", said)
        assert status == 200 and first["data"][0]["seed"] == 5
        assert ask("/v1/images/generations", {**said, "steps": 10**6})[0] == 400
        (replica,) = replicas(mark)
        os.kill(replica, signal.SIGKILL)
        until(lambda: bool(replicas(mark) - {replica}))
        until(lambda: ask("/ready")[0] == 200)
        assert ask("/v1/images/generations", said)[1]["data"] == first["data"]
        with ThreadPoolExecutor(8) as threads:
            every = [*threads.map(lambda _: ask("/v1/images/generations", {**said, "steps": 30})[0], range(8))]
        assert {*every} == {200, 429}, every
    finally:
        serve.shutdown()
        ray.shutdown()
