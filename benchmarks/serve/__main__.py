"""A load on the server: clients of every kind, some of whom leave or send garbage; its thread and all of it killed.

    python -m benchmarks.serve --requests 2000 --seed 0

The demo is served by a process of its own. Clients ask at once, each again where a client should: 429 when it is told
to, a broken connection or 503 while the server was killed, 500 where the thread died. At the end a pipeline here draws
a sample of the pictures one by one, as the command line does: bit for bit the same where the server's log says that a
picture was drawn alone, within rounding otherwise. It prints tables in Markdown; the exit code is 1 where a request was
lost, answered wrongly, or a picture is another one.
"""

import argparse
import queue
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

from benchmarks.serve import judged
from benchmarks.serve.asks import MEGABYTES, Ask, asks
from benchmarks.serve.clients import Answer, asked, garbage_bytes
from benchmarks.serve.server import Server
from mmdit.driver.pipeline import Pipeline
from mmdit.run import settle

KEYS = ("sk-of-alice-0123456789", "sk-of-bob-0123456789ab", "sk-of-carol-0123456789")
PREDICTED, LEFT = 'mmdit_memory_bytes{what="predicted"}', 'mmdit_cancelled_total{reason="left"}'
CACHE, ENCODERS = 'mmdit_texts_total{by="cache"}', 'mmdit_texts_total{by="encoders"}'
QUEUE = 24  # pictures
TOLD = 20  # of what is wrong
THREAD_DIES, ALL_DIES = (0.45, 0.6, 0.75), (0.2,)  # after these shares of the requests
WARM = 0.3  # after this share, memory is looked at for the first time


def load(
    every: Sequence[Ask],
    clients: int,
    url: str,
    excused: Callable[[float], bool],
    look: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Answers to all of these, by so many clients at a time. look: called now and then, with how many there are."""
    left, answers = queue.SimpleQueue[Ask](), list[Answer]()
    for ask in every:
        left.put(ask)

    def client() -> None:
        while True:
            try:
                ask = left.get_nowait()
            except queue.Empty:
                return
            answers.append(asked(ask, url, excused))

    with ThreadPoolExecutor(clients) as pool:
        running: Iterable[Future[None]] = [pool.submit(client) for _ in range(clients)]
        while not all(one.done() for one in running):
            look(len(answers))
            time.sleep(0.1)
        for one in running:
            one.result()
    return answers


class Watch:
    """Looks at the server while it is under load, and kills it when that is due."""

    def __init__(self, server: Server, requests: int) -> None:
        self._server, self._requests = server, requests
        self._threads = [round(share * requests) for share in THREAD_DIES]
        self._all = [round(share * requests) for share in ALL_DIES]
        self.queue = self.running = 0.0  # the most pictures
        self.memory: list[int] = []  # bytes after each tenth of the requests, of the last server
        self.counted: defaultdict[str, float] = defaultdict(float)  # by all servers, one after another
        self._last: dict[str, float] = {}

    def look(self, done: int) -> None:
        now = self._server.metrics()
        self.queue = max(self.queue, now.get("mmdit_queue_pictures", 0))
        self.running = max(self.running, now.get("mmdit_running_pictures", 0))
        self._last = now or self._last
        if self._all and done >= self._all[0]:
            self._all.pop(0)
            self.keep()
            self._server.kill()
        elif self._threads and done >= self._threads[0]:
            self._threads.pop(0)
            self._server.kill_thread()
        if not self._all and done >= (WARM + len(self.memory) / 10) * self._requests:
            self.memory.append(self._server.memory())

    def keep(self) -> None:
        """What counters of this server say, before it goes."""
        for name, value in self._last.items():
            self.counted[name] += value


def report(arguments: Sequence[str] | None, say: Callable[[str], object]) -> bool:
    """Run it, and tell what it found; whether all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=12, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=[*judged.ROUNDING], default="fp32")
    parser.add_argument("--sample", type=float, default=0.2, help="of the answers whose pictures are compared")
    given = parser.parse_args(arguments)
    every = asks(given.seed, given.requests, KEYS)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text("\n".join(f"{key} {name} {QUEUE}" for key, name in zip(KEYS, ("alice", "bob", "carol"))))
        server = Server(
            Path(folder, "log"), keys, KEYS[0], "--queue", str(QUEUE), "--most-megabytes", str(MEGABYTES),
            "--most-pictures", "4", "--dtype", given.dtype, "--device", "cpu",
        )  # fmt: skip
        watch, begun = Watch(server, given.requests), time.monotonic()
        answers = load(every, given.clients, server.url, server.excused, watch.look)
        seconds = time.monotonic() - begun
        alien = garbage_bytes(server.url)
        time.sleep(1)  # what nobody waits for any more takes its last step
        end = server.metrics()
        watch.look(given.requests)
        watch.keep()
        server.count()
        code, log, others = server.stop(), server.lines(), server.other_lines()
    pipe = Pipeline.load(device="cpu", dtype=given.dtype)
    settle()
    pipe("a horse", width=64, height=64, steps=1)
    drawn = [answer for answer in answers if answer.files]
    sample = Random(given.seed).sample(drawn, max(1, round(given.sample * len(drawn))))
    found = judged.compared(pipe, sample, log, judged.ROUNDING[given.dtype])

    bad = [f"{one.ask.kind}: {one.outcome}: {one.told}" for one in answers if one.outcome in ("lost", "wrong")]
    bad += [*found.wrong, *(f"in the log: {line}" for line in others)]
    rows = {
        "seconds, and of them without a server": f"{seconds:.1f}, {server.down:.1f}",
        **_rates(answers, seconds - server.down, found),
        "CPU seconds a picture: of the server, of the loop": f"{server.cpu / sum(len(a.files) for a in drawn):.3f}, "
        f"{found.cpu / found.count:.3f}",
        **_told(watch),
        "MB of the process, after 3, 4, ... tenths": ", ".join(f"{held / 1e6:.0f}" for held in watch.memory),
        "memory predicted by the plan": f"{end.get(PREDICTED, 0) / 1e6:.0f} MB",
        "answer to bytes that are no HTTP": alien or "none, closed",
        "exit code after SIGTERM": str(code),
    }
    for line in (*judged.table(answers), "", "| | |", "| --- | --- |"):
        say(line)
    for name, value in rows.items():
        say(f"| {name} | {value} |")
    for line in bad[:TOLD]:
        say(f"\nWRONG: {line}")
    say(f"\nwrong: {len(bad)}")
    return not (bad or code)


def _rates(answers: Sequence[Answer], up: float, found: judged.Compared) -> dict[str, str]:
    """up: seconds with a server."""
    pictures, tries = sum(len(answer.files) for answer in answers), Counter[str]()
    for answer in answers:
        tries += answer.tries
    return {
        "asked again after": ", ".join(f"{name.strip()}: {count}" for name, count in sorted(tries.items()))
        or "nothing",
        "pictures answered, a second while there was a server": f"{pictures}, {pictures / up:.2f}",
        "a second by a loop of single calls": f"{found.count / found.seconds:.2f} (a sample of {found.count})",
        "drawn alone: compared, greatest difference": f"{len(found.alone)}, {max(found.alone, default=0)} levels",
        "drawn together: compared, equal bit for bit": f"{len(found.together)}, {found.together.count(0)}",
        "their greatest difference, and the greatest of the means": f"{max(found.together, default=0)} levels, "
        f"{max(found.means, default=0.0):.2f}",
    }


def _told(watch: Watch) -> dict[str, str]:
    """What the server counted."""

    def mean(name: str) -> float:
        return watch.counted[f"mmdit_{name}_sum"] / max(1, watch.counted[f"mmdit_{name}_count"])

    return {
        "most pictures waiting, being drawn": f"{watch.queue:.0f}, {watch.running:.0f}",
        "pictures of a step, of a drawing, in the mean": f"{mean('step_pictures'):.2f}, {mean('batch_pictures'):.2f}",
        "wait in the queue, time of a picture's step, in the mean": f"{mean('queue_seconds'):.3f} s, "
        f"{1000 * mean('step_seconds'):.1f} ms",
        "deaths of the thread that draws": f"{watch.counted['mmdit_worker_deaths_total']:.0f}",
        "pictures let go because a client left": f"{watch.counted[LEFT]:.0f}",
        "texts from the cache, from the encoders": f"{watch.counted[CACHE]:.0f}, {watch.counted[ENCODERS]:.0f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return 0 if report(arguments, lambda line: print(line, flush=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
