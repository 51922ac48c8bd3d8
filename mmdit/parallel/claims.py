"""Parts of a list, claimed by files in a folder that all processes see, whatever machine they are on.

    PART.1.claim    who has it; made exclusively, its time renewed while the owner lives
    PART.2.claim    who took it over, when the first was not renewed in time; the highest number counts
    PART.done       all of it is drawn or given up; its claims are removed
    PART.3.failed   its picture 3 was given up: a line of JSON that says why
    WHO.clock       a process that takes part, its time renewed while it lives

A claim is never changed by another process, and nothing is renamed: of several that take a claim over one makes the
next number. Clocks of machines may differ: every time is one that the folder's own file system wrote, and the present
is the time of a file that was written just now.

What is done twice all the same, by an owner who was only slow, leaves one file: pictures are written once
(`mmdit.driver.output.save_image`).
"""

import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from secrets import token_hex
from threading import Event, Thread
from typing import Any, Self

from mmdit.common.errors import SettingsError, UserError
from mmdit.common.files import beside, put, sweep

FOLDER = ".claims"
PATIENCE = 120  # seconds
_TRIES = 10  # to make a folder that others are removing
_RENEWALS = 6  # in the time after which a claim may be taken over


class State(Enum):
    """Why a part cannot be had."""

    DONE = "done"
    BUSY = "busy"


class Claim:
    """A part that this process has."""

    def __init__(self, claims: "Claims", part: str, tries: int) -> None:
        """tries: how many processes had it, this one included."""
        self.claims, self.part, self.tries = claims, part, tries
        self.path = claims.claim_path(part, tries)
        self.lost = False  # another process has it by now, or had it and is done

    def begin(self, index: int) -> bool:
        """Note that picture `index` is going to be drawn alone; False where the part is lost to another process."""
        self.lost = self.claims.claim_path(self.part, self.tries + 1).exists()
        if not self.lost:
            try:
                with self.path.open("r+") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(f"{index}\n")
                    file.flush()
                    os.fsync(file.fileno())
            except FileNotFoundError:
                self.lost = True
        return not self.lost

    def begun_before(self) -> set[int]:
        """The pictures that an earlier owner drew alone when it died, or had drawn before."""
        found: set[int] = set()
        for tries in range(1, self.tries):
            with suppress(OSError):
                lines = self.claims.claim_path(self.part, tries).read_text().split("\n")[1:-1]  # whole ones
                found |= {int(line) for line in lines if line.isdecimal()}
        return found

    def give_up(self, index: int, told: dict[str, Any]) -> str:
        """Picture `index` is not going to be drawn. told: goes into the list of failures, as the line returned."""
        path, line = self.claims.failed_path(self.part, index), json.dumps(told, ensure_ascii=False)
        with beside(path) as written:
            written.write_text(f"{line}\n", encoding="utf-8")
            put(written, path)
        return line

    def given_up(self, index: int) -> bool:
        return self.claims.failed_path(self.part, index).exists()

    def done(self) -> None:
        self.claims.now()  # the folder may have been swept
        self.claims.done_path(self.part).touch()
        for tries in itertools.count(1):
            path = self.claims.claim_path(self.part, tries)
            if tries > self.tries and not path.exists():
                break
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """As if it had not been claimed."""
        if not self.claims.claim_path(self.part, self.tries + 1).exists():
            self.path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """It may be taken over at once; that this process had it counts."""
        with suppress(OSError):
            os.utime(self.path, (0, 0))


class Claims:
    """What one process claims; used as a context, within which it takes part."""

    def __init__(self, out: Path, patience: float, since: float | None = None) -> None:
        """out: the folder of the run. patience: seconds after which what is not renewed may be taken over.

        since: when the pictures were looked at, by the folder's clock, if not after this; parts that were done before
        are not believed. Raises SettingsError where the folder cannot be written to.
        """
        self.folder, self._patience = out / FOLDER, patience
        self.who = f"{platform.node()}.{os.getpid()}.{token_hex(4)}"
        self._clock = self.folder / f"{self.who}.clock"
        self._held: Claim | None = None
        self._made = [folder for folder in self.folder.parents if not folder.exists()]
        try:
            now = self.now()
            self.since = now if since is None else since
        except OSError as error:
            raise SettingsError(f"claim: cannot write into {self.folder}: {error.strerror or error}") from None

    def claim_path(self, part: str, tries: int) -> Path:
        return self.folder / f"{part}.{tries}.claim"

    def done_path(self, part: str) -> Path:
        return self.folder / f"{part}.done"

    def failed_path(self, part: str, index: int) -> Path:
        return self.folder / f"{part}.{index}.failed"

    def now(self) -> float:
        """The folder's own time. Makes folder and clock where they are not there, or not any more. Raises OSError."""
        for left in reversed(range(_TRIES)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clock.touch()
                return self._clock.stat().st_mtime
            except (FileNotFoundError, FileExistsError):  # the last of others, which ends, removes them just now
                if not left:
                    raise
        raise AssertionError

    def take(self, part: str) -> Claim | State:
        """Claim a part, or take it over from an owner that has not renewed its claim; or why not. Raises OSError."""
        if self._is_done(part):
            return State.DONE
        last = 0
        while self.claim_path(part, last + 1).exists():
            last += 1
        if last and self._is_fresh(self.claim_path(part, last)):
            return State.BUSY
        claim = Claim(self, part, last + 1)
        told = {"who": self.who, "patience": self._patience}
        try:
            file = os.open(claim.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return State.BUSY
        except FileNotFoundError:  # the folder was swept
            self.now()
            return State.BUSY
        try:
            with os.fdopen(file, "w") as opened:
                opened.write(json.dumps(told) + "\n")
        except OSError:  # a full disk
            claim.path.unlink(missing_ok=True)
            raise
        if self._is_done(part):  # a moment ago
            claim.path.unlink(missing_ok=True)
            return State.DONE
        return claim

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew it meanwhile. At the end it is done, but for a lost one; broken off, others may have it at once."""
        self._held = claim
        try:
            yield
        except (KeyboardInterrupt, BrokenPipeError, UserError):
            self._held = None
            claim.release()
            raise
        except BaseException:
            self._held = None
            claim.abandon()
            raise
        self._held = None
        if not claim.lost:
            claim.done()

    def failures(self) -> list[str]:
        """The lines of all pictures that were given up."""
        return [path.read_text(encoding="utf-8").strip() for path in sorted(self.folder.glob("*.failed"))]

    def _is_done(self, part: str) -> bool:
        try:
            return self.done_path(part).stat().st_mtime > self.since
        except OSError:
            return False

    def _is_fresh(self, path: Path) -> bool:
        """Whether its owner renewed it in the time that it promised to."""
        try:
            with path.open() as file:  # to open is what makes a network's file system look anew
                renewed, text = os.fstat(file.fileno()).st_mtime, file.readline()
        except OSError:
            return True  # it went a moment ago
        try:
            patience = float(json.loads(text)["patience"])
        except (ValueError, LookupError, TypeError):
            patience = self._patience  # its owner died before it had written that
        return self.now() - renewed < patience

    # ---- taking part -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._ended = Event()
        self._thread = Thread(target=self._renew, name="claims", daemon=True)
        self._thread.start()
        return self

    def _renew(self) -> None:
        while not self._ended.wait(self._patience / _RENEWALS):
            with suppress(OSError):
                self.now()
            with suppress(OSError):
                if (held := self._held) is not None:
                    os.utime(held.path)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._sweep()

    def _sweep(self) -> None:
        """Remove what nobody needs any more, where this is the last process that takes part."""
        now = self.now()
        self._clock.unlink(missing_ok=True)
        for clock in self.folder.glob("*.clock"):
            if now - clock.stat().st_mtime < self._patience:
                return
        if any(not self.done_path(path.name.split(".")[0]).exists() for path in self.folder.glob("*.claim")):
            return
        sweep(self.folder)
        for path in [path for path in self.folder.iterdir() if path.suffix in (".done", ".clock", ".claim")]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in (self.folder, *self._made):  # where nothing was given up, and then nothing was drawn
                folder.rmdir()

    def wait(self) -> None:
        """A little, until others may be done or late."""
        time.sleep(min(5.0, self._patience / _RENEWALS))
