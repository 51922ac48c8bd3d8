"""A server in a process of its own, which is killed and begun anew; what it says of itself."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_PATIENCE = 120  # seconds until it is ready
_SHADOW = 5.0  # seconds after a kill in which requests may still meet it


class Server:
    """`python -m benchmarks.serve.launched`, with its log in a file."""

    def __init__(self, log: Path, keys: Path, key: str, *more: str) -> None:
        """key: one that it lets in. more: arguments."""
        self._log, self._key, self._port = log, key, "0"
        self._more = ["--api-key-file", str(keys), *more]
        self._until: list[float] = []  # of each kill: when what it did is over
        self.down = 0.0  # seconds without a server
        self.cpu = self._loading = 0.0  # seconds of the processor, without loading
        self.url = ""
        self.start()

    def start(self) -> None:
        """Returns when it is ready."""
        begun = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serve.launched", "--port", self._port, *self._more],
                cwd=_ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"the server did not begin: {self._log.read_text()[-2000:]}")
        self._port = self.url.rpartition(":")[2]
        while self._status("/ready") != 200:
            assert time.monotonic() - begun < _PATIENCE, "the server is not ready"
            time.sleep(0.1)
        self._loading = self._used()

    def count(self) -> None:
        """Add what this process used to `cpu`, before it goes."""
        self.cpu += self._used() - self._loading

    def _used(self) -> float:
        after_name = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL, as a machine that runs out of memory does; returns when another one is ready."""
        begun = time.monotonic()
        self._until.append(math.inf)
        self.count()
        self._process.kill()
        self._process.wait()
        self.start()
        self._until[-1] = time.monotonic() + _SHADOW
        self.down += time.monotonic() - begun

    def kill_thread(self) -> None:
        self._until.append(time.monotonic() + _SHADOW)
        self._process.send_signal(signal.SIGUSR1)

    def excused(self, since: float) -> bool:
        """Whether it was made to die shortly before this moment, or after it."""
        return any(since < until for until in self._until)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_PATIENCE)

    def lines(self) -> list[dict[str, Any]]:
        """Of the log; one may be cut off by a kill."""
        return parsed(self._log.read_text(errors="replace").splitlines())

    def other_lines(self) -> list[str]:
        """What it wrote beside them: there should be nothing."""
        return [line for line in self._log.read_text(errors="replace").splitlines() if line and line[0] != "{"]

    def memory(self) -> int:
        """Bytes that its process holds."""
        with open(f"/proc/{self._process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> dict[str, float]:
        """By name with labels; empty where there is no server."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {self._key}"})
        with suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
            return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        return {}

    def _status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status
        except OSError as error:
            return getattr(error, "code", 0)


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "id" in line]
