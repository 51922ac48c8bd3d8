"""A list drawn while machines die: what is lost, what is there twice.

    python -m benchmarks.cluster claims          processes that share a folder
    python -m benchmarks.cluster ray             actors on a cluster of three nodes in this machine (the extra `ray`)

500 pictures of the demo, of three kinds, and two rows that cannot be drawn: one kills whoever draws it, one raises an
error. In the middle processes are killed by SIGKILL, of Ray a whole node as well. Afterwards every picture has to be
there, each once, and those two have to be listed. Processes that died are begun anew, as a scheduler would.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from threading import Event, Thread
from typing import Any

from mmdit.driver.output import settings_in, stem
from mmdit.driver.settings import Settings, identity
from mmdit.parallel.claims import FOLDER

TRAP, PIT = "a trap", "a pit"  # prompts that kill, and that raise
KINDS: tuple[dict[str, Any], ...] = ({}, {"width": 32}, {"cfg": 1.0})
PROMPTS = ("a horse", "a bear and a fox", "a blue whale", "a cat, a dog and an owl")
USUAL = ("--width", "64", "--height", "64", "--steps", "2", "--device", "cpu", "--dtype", "fp32")
KILLS = (0.15, 0.3, 0.6)  # of the pictures are there when a process is killed
NODE = 0.45  # and a node
PROCESSES = 3


def lines_of(pictures: int) -> list[dict[str, Any]]:
    """A list of so many pictures and the two rows, every one with a seed of its own."""
    own = [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, **KINDS[i % 7 % len(KINDS)]} for i in range(pictures)]
    own.insert(pictures // 2, {"prompt": TRAP, "seed": pictures})
    own.insert(pictures // 3, {"prompt": PIT, "seed": pictures + 1})
    return own


def deadly() -> None:
    """In this process the two rows do from now on what they are for."""
    from mmdit.driver.loop import Drawing

    begin = Drawing._begin

    def dying(self: Drawing, alike: Any, start: Any, texts: Any, index: int) -> Any:
        if alike[index].prompt == TRAP:
            os.kill(os.getpid(), signal.SIGKILL)
        if alike[index].prompt == PIT:
            raise RuntimeError("it fell into a pit")
        return begin(self, alike, start, texts, index)

    Drawing._begin = dying  # type: ignore[method-assign]


# ---- what dies -------------------------------------------------------------------------------------


@dataclass
class Reaper:
    """Kills whoever has a claim, and does more, as pictures come."""

    out: Path
    pictures: int
    kills: Sequence[float] = KILLS
    more: dict[float, Callable[[], object]] = field(default_factory=dict)
    killed: int = 0

    def __enter__(self) -> "Reaper":
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        plan: list[tuple[float, Callable[[], object]]] = [*((at, self.kill) for at in self.kills), *self.more.items()]
        for at, act in sorted(plan, key=lambda planned: planned[0]):
            while not self._ended.wait(0.02) and len([*self.out.glob("*.png")]) < at * self.pictures:
                pass
            while not self._ended.is_set() and act() is False:
                time.sleep(0.02)

    def kill(self) -> bool:
        """One that has a claim and lives; False where there is none just now."""
        for claim in self.out.glob(f"{FOLDER}/*.claim"):
            try:
                who = json.loads(claim.read_text())["who"]
                os.kill(int(who.split(".")[-2]), signal.SIGKILL)
            except (OSError, ValueError, LookupError):
                continue
            self.killed += 1
            return True
        return False


@dataclass
class Ended:
    """What became of a list."""

    lost: list[str]
    twice: int
    strange: list[str]  # files that nobody asked for
    given_up: list[str]
    killed: int
    by_rows: int = 0  # processes that their row killed, where that is known
    nodes: int = 0

    def __str__(self) -> str:
        told = f"{len(self.lost)} lost, {self.twice} twice, {len(self.strange)} strange; given up: {self.given_up}"
        return f"{told}; {self.killed} killed, {self.nodes} nodes removed"


def ended(out: Path, lines: Sequence[dict[str, Any]], killed: int) -> Ended:
    wanted = {f"{stem(Settings(line['prompt'], seed=line['seed']))}.png" for line in lines}
    there = {path.name: settings_in(path) for path in out.glob("*.png")}
    whole = [identity(s) for s in there.values() if s is not None]
    failed = out / "failed.jsonl"
    told = map(json.loads, failed.read_text().splitlines()) if failed.exists() else ()
    given_up = sorted(line["prompt"] for line in told)
    unwanted = {
        f"{stem(Settings(line['prompt'], seed=line['seed']))}.png" for line in lines if line["prompt"] in given_up
    }
    lost = sorted(wanted - unwanted - {name for name, s in there.items() if s is not None})
    strange = sorted({path.name for path in out.iterdir()} - wanted - {FOLDER, failed.name})
    return Ended(lost, len(whole) - len({*whole}), strange, given_up, killed)


# ---- two ways --------------------------------------------------------------------------------------


def by_claims(folder: Path, pictures: int, processes: int = PROCESSES, kills: Sequence[float] = KILLS) -> Ended:
    """Processes that know nothing of each other; one that dies is begun anew."""
    lines, listed, out = lines_of(pictures), folder / "list.jsonl", folder / "claimed"
    listed.write_text("\n".join(map(json.dumps, lines)))
    told = ["--prompts", str(listed), "--out", str(out), "--claim", "3", *USUAL]
    command = [sys.executable, "-c", f"from benchmarks.cluster import worker; worker({told!r})"]

    def begun() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)

    dead = 0
    with (folder / "claims.log").open("w") as log, Reaper(out, pictures, kills) as reaper:
        running = [begun() for _ in range(processes)]
        while running:
            time.sleep(0.05)
            for process in [p for p in running if p.poll() is not None]:
                running.remove(process)
                if process.returncode == -signal.SIGKILL:
                    dead += 1
                    running.append(begun())
                assert process.returncode in (0, -signal.SIGKILL), (folder / "claims.log").read_text()
    found = ended(out, lines, reaper.killed)
    found.by_rows = dead - reaper.killed
    return found


def worker(arguments: list[str]) -> None:
    """A process of them."""
    from mmdit.run import main

    deadly()
    sys.exit(main(arguments))


def by_ray(folder: Path, pictures: int, kills: Sequence[float] = KILLS, nodes: int = 3) -> Ended:
    """Actors on a cluster of so many nodes in this machine, one of which is removed in the middle."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    from mmdit.ray import lists
    from mmdit.ray.actor import Painter
    from mmdit.run import main

    class Deadly(Painter):
        def load(self, *given: Any) -> None:
            deadly()
            super().load(*given)

    lines, listed, out = lines_of(pictures), folder / "list.jsonl", folder / "by-ray"
    listed.write_text("\n".join(map(json.dumps, lines)))
    told = ["--prompts", str(listed), "--out", str(out), "--ray", "auto", "--claim", "5", *USUAL]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    others = [cluster.add_node(**node) for _ in range(nodes - 1)]
    usual, lists.Painter = lists.Painter, Deadly  # type: ignore[misc]
    removed = []

    def remove() -> None:
        removed.append(others.pop())
        cluster.remove_node(removed[0], allow_graceful=False)

    try:
        ray.init(address=cluster.address, **lists.QUIET)
        with Reaper(out, pictures, kills, {NODE: remove}) as reaper, redirect_stdout(StringIO()):
            assert main(told) == 0
    finally:
        lists.Painter = usual
        ray.shutdown()
        cluster.shutdown()
    found = ended(out, lines, reaper.killed)
    found.nodes = len(removed)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("claims", "ray"))
    parser.add_argument("--pictures", type=int, default=500)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        print((by_claims if given.way == "claims" else by_ray)(Path(name), given.pictures))


if __name__ == "__main__":
    main()
