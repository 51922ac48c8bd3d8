"""Long sweeps: which of their cases run every time."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

TURN = int(os.environ.get("FUZZ_SEED", "0"))


def sampled(cases: Iterable[Any], of: int) -> list[Any]:
    """One of every `of` cases runs, in CI every day another: FUZZ_SEED says which.

    The others are marked `sweep`, and run with --all.
    """
    every, found = list(cases), []
    turn = TURN % min(of, len(every))
    for i, case in enumerate(every):
        given = case if isinstance(case, PARAM) else pytest.param(*(case if type(case) is tuple else (case,)))
        more = () if i % of == turn else (pytest.mark.sweep,)
        found.append(pytest.param(*given.values, marks=[*given.marks, *more], id=given.id))
    return found


PARAM = type(pytest.param(0))
