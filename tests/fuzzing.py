"""Trying damaged files of one kind, each within bounds of time and memory.

FUZZ=10000 in the environment sets how many of each kind are tried, FUZZ_SEED=1 which; the same seed gives the same
files. `pytest -s` prints a line of figures for each kind.
"""

import json
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from damage import damaged_files
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from sweeps import SEED

from weights import CheckpointError
from weights.inspect import inspect
from weights.report import report

COUNT = int(os.environ.get("FUZZ", "40"))
MEMORY = 100 << 20  # bytes that a damaged file may cost
ALARM = 5  # seconds: one is allowed, the rest is for a busy machine
LONGEST = 4200  # characters of a message, with the file's name
Files = dict[str, bytes]  # by their names in a folder; a single file has the name "file"


class HangError(BaseException):
    """A file took too long; not an Exception, so that nothing takes it for its own."""


@dataclass
class Trial:
    """One kind of file.

    files: a valid one; load: all that reads it, to a value; check: AssertionError where that value is not what the
    (damaged) files say; words: names that may stand in the place of others; errors: how a file may be refused.
    """

    files: Files
    load: Callable[[Path], Any]
    check: Callable[[Files, Any], object]
    words: Sequence[Any] = ()
    errors: tuple[type[Exception], ...] = (CheckpointError,)
    facts: Callable[[Files, dict[str, Any]], object] | None = lambda *_: None  # as check; None: not described at all
    damaged: Callable[..., Files] = damaged_files


@dataclass
class Tally:
    """What became of the files of one kind."""

    tried: int = 0
    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds of processor time
    most: int = 0  # bytes of resident memory that one took

    def row(self, name: str) -> str:
        counts = f"{self.tried} | {self.loaded} | {self.refused}"
        return f"| {name} | {counts} | {self.slowest * 1e3:.0f} ms | {self.most / 1e6:.1f} MB |"


def fuzz(name: str, trial: Trial) -> Tally:
    """Load a valid file, then COUNT damaged ones: each is right, or refused with the file's name on one line."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is bounded and measured under Linux only")
    tally = Tally()
    with scratch() as root:
        place = Place(root, trial.files)
        trial.check(trial.files, _loaded(trial, place.path, tally))

        @seed(SEED)
        @settings(max_examples=COUNT, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def run(pick: Random) -> None:
            files = trial.damaged(pick, trial.files, trial.words)
            place.put(files)
            changed = [name for name in files if files[name] != trial.files.get(name)]
            note(f"FUZZ_SEED={SEED} FUZZ={COUNT}: {changed} under {place.path}")
            tally.tried += 1
            try:
                value = _loaded(trial, place.path, tally)
            except trial.errors as error:
                check_message(str(error), place.path)
                tally.refused += 1
            else:
                trial.check(files, value)
                tally.loaded += 1
            if trial.facts is not None:
                _check_facts(trial, files, place.path, tally)

        run()
    assert tally.tried >= COUNT and tally.loaded > 0 and tally.refused > 0
    print(tally.row(name))
    return tally


def _loaded(trial: Trial, path: Path, tally: Tally) -> Any:
    with bounded(tally), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = trial.load(path)
    for warning in caught:
        check_message(str(warning.message), path)
    return value


def _check_facts(trial: Trial, files: Files, path: Path, tally: Tally) -> None:
    """`python -m weights` describes the file, in words and as JSON, or refuses it as loading does."""
    try:
        with bounded(tally):
            facts = inspect(path)
    except CheckpointError as error:
        check_message(str(error), path)
        return
    lines = report(facts)
    assert all(line.isprintable() for line in lines)
    assert len(json.dumps(facts, allow_nan=False)) < 100_000
    assert trial.facts is not None
    trial.facts(files, facts)


def check_message(message: str, path: Path) -> None:
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < LONGEST


# ---- bounds --------------------------------------------------------------------------------------


@contextmanager
def bounded(tally: Tally) -> Iterator[None]:
    """More than MEMORY of new address space is a MemoryError, more than ALARM seconds a HangError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size, resident, _ = _memory()
    _forget_peak()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, ALARM, 1)  # again and again: what is raised in a callback is lost
    start = time.process_time()
    try:
        yield
    finally:
        tally.slowest = max(tally.slowest, time.process_time() - start)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        tally.most = max(tally.most, _memory()[2] - resident)


def _alarm(*_: object) -> None:
    raise HangError(f"more than {ALARM} seconds")


def _memory() -> tuple[int, int, int]:
    """Bytes of address space and of resident memory, and the most that was resident."""
    status = Path("/proc/self/status").read_text()
    size, resident, peak = (int(status.split(f"{word}:", 1)[1].split()[0]) for word in ("VmSize", "VmRSS", "VmHWM"))
    return size << 10, resident << 10, peak << 10


def _forget_peak() -> None:
    with suppress(OSError):  # not every kernel lets it: the most of all files so far is told then
        Path("/proc/self/clear_refs").write_text("5")


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: tens of thousands of files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class Place:
    """Where the files of one kind are, the damaged ones in the place of the valid ones."""

    def __init__(self, root: Path, files: Mapping[str, bytes]) -> None:
        """Copies of the weights go above their folders: nothing may be read from there."""
        self._root, self._there = root / "model", {}
        self._root.mkdir()
        self.path = self._root / "file" if set(files) == {"file"} else self._root
        for name in files:
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)
            for above in (root, self._root):
                if name.count("/") and name.endswith(".safetensors"):
                    (above / Path(name).name).write_bytes(files[name])
        self.put(files)

    def put(self, files: Mapping[str, bytes]) -> None:
        for name in {**self._there, **files}:
            if self._there.get(name) != files.get(name):
                # Never written into: a mapping of the old file may still be alive.
                (self._root / name).unlink(missing_ok=True)
                if name in files:
                    (self._root / name).write_bytes(files[name])
        self._there = dict(files)
