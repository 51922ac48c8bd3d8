"""What came of a load: outcomes, times, and whether the pictures are those of the command line."""

import io
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serve.asks import KINDS
from benchmarks.serve.clients import Answer
from mmdit.driver.pipeline import Pipeline

# Levels: the mean difference that a picture of a batch may have at most. In bfloat16 a few steps make much of rounding;
# another seed's picture differs by some 127.
ROUNDING = {"fp32": 0.5, "auto": 6.0, "bf16": 6.0}


@dataclass
class Compared:
    """Pictures of answers beside those that a pipeline of its own draws one by one."""

    seconds: float = 0.0  # of its calls
    cpu: float = 0.0  # the same of the processor
    alone: list[int] = field(default_factory=list)  # the greatest difference in levels of each that was drawn alone
    together: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)  # the mean difference of each of these
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.alone) + len(self.together)


def compared(pipe: Pipeline, answers: Sequence[Answer], log: Sequence[Mapping[str, Any]], rounding: float) -> Compared:
    """log: the server's lines, of which that with the answer's id says how many pictures were drawn together.

    rounding: levels that pictures drawn together may differ by in the mean.
    """
    found, together = Compared(), {line["id"]: line.get("together") for line in log}
    for answer in answers:
        for own, file in zip(answer.ask.pictures, answer.files):
            begun, used = time.perf_counter(), time.process_time()
            expected = np.asarray(pipe(**own)[0]).astype(int)
            found.seconds += time.perf_counter() - begun
            found.cpu += time.process_time() - used
            seen = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
            if seen.shape != expected.shape:
                found.wrong.append(f"{answer.ask.kind}: {seen.shape} is not {expected.shape}: {own}")
                continue
            far, alone = np.abs(seen - expected), together.get(answer.id) == 1
            (found.alone if alone else found.together).append(int(far.max()))
            found.means += [] if alone else [float(far.mean())]
            if far.max() if alone else far.mean() > rounding:
                found.wrong.append(f"{answer.ask.kind}, {together.get(answer.id)} together: {far.max()} levels: {own}")
    return found


def at(share: float, seconds: Sequence[float]) -> float:
    """A quantile: the least time within which this share of them is."""
    return sorted(seconds)[max(0, min(len(seconds), round(share * len(seconds) + 0.5)) - 1)]


def table(answers: Sequence[Answer]) -> list[str]:
    """A line for each kind of request, in Markdown."""
    outcomes = ("answered", "refused", "left", "wrong", "lost")
    lines = [f"| requests | {' | '.join(outcomes)} | p50 | p99 |", f"| --- |{' --- |' * (len(outcomes) + 2)}"]
    for kind in (*KINDS, "all"):
        own = [answer for answer in answers if kind in (answer.ask.kind, "all")]
        counts = Counter(answer.outcome for answer in own)
        stayed = [answer.seconds for answer in own if answer.outcome in ("answered", "refused")]
        times = f"{statistics.median(stayed):.3f} s | {at(0.99, stayed):.3f} s" if stayed else " | "
        lines.append(f"| {kind} | {' | '.join(str(counts[one]) for one in outcomes)} | {times} |")
    return lines
