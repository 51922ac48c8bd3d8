"""Long sweeps: which of their cases run."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

SEED = int(os.environ.get("FUZZ_SEED", "0"))  # in CI every day another
_PARAM = type(pytest.param(0))


def sampled(cases: Iterable[Any], of: int) -> list[Any]:
    """One of every `of` cases runs, with another SEED another; the others are marked `sweep`, and run with --all."""
    every, found = list(cases), []
    turn = SEED % min(of, len(every))
    for i, case in enumerate(every):
        given = case if isinstance(case, _PARAM) else pytest.param(*(case if type(case) is tuple else (case,)))
        more = () if i % of == turn else (pytest.mark.sweep,)
        found.append(pytest.param(*given.values, marks=[*given.marks, *more], id=given.id))
    return found
