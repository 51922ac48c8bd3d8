"""Long sweeps: which of their cases run every time."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], of: int) -> list[Any]:
    """One of every `of` cases, the first of them, always runs; the others are marked `sweep`, and run with --all."""
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(case if i % of == 0 else pytest.param(*values, marks=pytest.mark.sweep))
    return found
