"""A training that can be stopped: what it is in the middle of, what it has told, and what it draws at random.

All that is drawn follows from the seed and the number of the iteration. So a run that was stopped and goes on is the
run that never stopped, bit for bit where the device computes the same twice.
"""

import hashlib
import json
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdit.common.errors import SettingsError
from mmdit.driver.output import check_folder, save_dump


def seeded(*what: object) -> torch.Generator:
    """A generator on the CPU whose numbers follow from these words and numbers, and are the same everywhere."""
    digest = hashlib.sha256(json.dumps(list(map(str, what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def picked(count: int, seed: int, iteration: int) -> int:
    """Which of so many things has its turn: all have one, in an order drawn anew, before any has the next."""
    again, place = divmod(iteration, count)
    return int(torch.randperm(count, generator=seeded(seed, "order", again))[place])


class Files:
    """What lies beside the adapter: the run that it comes from, its log, and pictures drawn by it."""

    def __init__(self, out: Path) -> None:
        self.out, stem = out, out.name.removesuffix(".safetensors")
        self.run = out.with_name(f"{stem}.run.pt")
        self.log = out.with_name(f"{stem}.log.jsonl")
        self.pictures = out.with_name(f"{stem}.pictures")

    def check(self) -> None:
        """Raise SettingsError where they cannot be written, or something else is there already."""
        if self.out.is_dir():
            raise SettingsError(f"out: {self.out} is a folder, expected a file's name")
        check_folder("out", self.out.parent)
        for path in (self.out, self.log, self.pictures) if not self.run.exists() else ():
            if path.exists():
                raise SettingsError(f"out: {path} is there, without the run that made it: expected a new name")


class Log:
    """JSON lines, on the disk as soon as they are told."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """lines: of the run so far; what else the file has is of iterations that are done once more."""
        self.path, self.lines = path, lines
        self._write("w", lines)

    def __call__(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._write("a", [line])

    def _write(self, mode: str, lines: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise SettingsError(f"cannot write {self.path}: {error.strerror or error}") from None


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole, in the place of what is there; SettingsError."""
    save_dump(partial(torch.save, state), path)


def read(path: Path, told: dict[str, Any]) -> dict[str, Any] | None:
    """What was saved, None where nothing is there.

    told: what makes the run what it is, under this name in the state. Raises SettingsError where that is another.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        begun: dict[str, Any] = state["told"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise SettingsError(
            f"{path}: is no saved run, or a damaged one: move it away, or give --out a new name"
        ) from None
    for name, value in told.items():
        if begun.get(name) != value:
            raise SettingsError(
                f"{path}: was begun with {name} {begun.get(name)!s:.80}, now it is {value!s:.80}: "
                "expected the same, or a new name for --out"
            )
    return state


@contextmanager
def undivided() -> Iterator[None]:
    """Meanwhile a signal that would end the run waits; then it is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {s: signal.signal(s, lambda s, _: waiting.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    if waiting:
        raise KeyboardInterrupt
