"""A list shared by claims: parts are taken one after another; what fails is noted, and the rest goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdit.common.command import say
from mmdit.common.errors import SettingsError, UserError
from mmdit.common.files import beside, put
from mmdit.driver.output import UnwritableError, is_sheet, is_there
from mmdit.driver.prompts import ERROR, line_of
from mmdit.driver.settings import Settings
from mmdit.parallel.claims import Claim, Claims, State
from mmdit.parallel.shards import Part, Placed, parts_of

FAILURES = "failed.jsonl"
_IN_A_ROW = 16  # pictures that fail one after another: then it is the machine

Wanted = tuple[Settings, Path]
Draw = Callable[[Sequence[Wanted]], None]  # draws pictures and writes them


class FailingError(SettingsError):
    """So many pictures failed that it must be the machine."""


@dataclass
class Tally:
    """What became of the pictures that this process had a claim to."""

    drawn: int = 0
    failed: list[str] = field(default_factory=list)  # a line for each that it gave up
    in_a_row: int = 0  # failures since the last picture that was drawn

    def count(self, path: Path) -> None:
        self.drawn, self.in_a_row = self.drawn + (not is_sheet(path)), 0


def draw_claimed(pictures: Sequence[Placed], out: str, claims: Claims, draw: Draw, tally: Tally) -> None:
    """Draw all pictures of a list that nobody else draws; return when all are there or given up, whoever did it.

    Raises what ends this process: a disk that refuses files, a device that fails at everything.
    """
    try:
        _draw_claimed(pictures, out, claims, draw, tally)
    except BrokenPipeError:  # nobody reads what is written
        raise
    except OSError as error:
        raise UnwritableError(f"claim: {claims.folder}: {error.strerror or error}") from error


def _draw_claimed(pictures: Sequence[Placed], out: str, claims: Claims, draw: Draw, tally: Tally) -> None:
    left = [part for part in parts_of(pictures, out) if any(path is not None for _, path in part.pictures)]
    while left:
        busy = []
        for part in left:
            taken = claims.take(part.name)
            if isinstance(taken, Claim):
                taken = State.DONE if draw_part(taken, part, out, draw, tally) else State.BUSY
            if taken is State.BUSY:
                busy.append(part)
        if len(busy) == len(left):
            claims.wait()
        left = busy


def draw_part(claim: Claim, part: Part, out: str, draw: Draw, tally: Tally) -> bool:
    """Draw of a claimed part what is missing: together at the first try, then one by one.

    Returns whether it is done; else another process took it over.

    A process that dies fails at the whole part. Whoever takes it over notes each picture before it draws it; if that
    one dies as well, this picture has had two tries, and the next owner gives it up. So it is with errors.
    """
    with claim.claims.holding(claim):
        left = _missing(claim, part)
        if claim.tries == 1 and left:
            try:
                draw([wanted for _, wanted in left])
                return True
            except Exception as error:
                if is_of_the_process(error):
                    raise
            left = _missing(claim, part)
        begun = claim.begun_before()
        for index, wanted in left:
            if index in begun:
                give_up(claim, index, wanted[0], out, tally, "whoever drew it died, twice")
                continue
            if not claim.begin(index):
                break
            try:
                draw([wanted])
            except Exception as error:
                if is_of_the_process(error):
                    raise
                give_up(claim, index, wanted[0], out, tally, f"{type(error).__name__}: {error}")
                tally.in_a_row += not isinstance(error, SettingsError)  # that is what the row asks for
                if tally.in_a_row >= _IN_A_ROW:
                    raise FailingError(f"{_IN_A_ROW} pictures in a row failed, at last by {error}") from error
    return not claim.lost


def give_up(claim: Claim, index: int, settings: Settings, out: str, tally: Tally, error: str) -> None:
    line: dict[str, Any] = line_of(settings, out) | {ERROR: error[:1000]}
    tally.failed.append(claim.give_up(index, line))
    say(f"given up: {settings.prompt!r:.100}, seed {settings.seed}: {error[:500]}")


def write_failures(claims: Claims, out: str) -> str:
    """Put all pictures that were given up into one list, and say where; nothing where there are none."""
    path = Path(out).expanduser() / FAILURES
    try:
        lines = claims.failures()
        if not lines:
            return ""
        with beside(path) as written:
            written.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            put(written, path)
    except OSError as error:
        raise UnwritableError(f"cannot write {path}: {error.strerror or error}") from None
    return f"; {len(lines)} are in {path} (without {claims.folder} they are tried again)"


def _missing(claim: Claim, part: Part) -> list[tuple[int, Wanted]]:
    every = [(i, (s, path)) for i, (s, path) in enumerate(part.pictures) if path is not None]
    return [(i, wanted) for i, wanted in every if not claim.given_up(i) and not is_there(*wanted)]


def is_of_the_process(error: Exception) -> bool:
    """Whether no other picture could be drawn, written or told either."""
    broken = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    untold = isinstance(error, BrokenPipeError) or type(error) is UserError  # the latter by standard output alone
    return broken or untold or isinstance(error, UnwritableError | FailingError)
