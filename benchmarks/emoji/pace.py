"""How long a step of a variant takes, as a share of the base's, measured in turn.

The seconds that a run spent are no measure of its variant: what else the machine did grows a thread's seconds by up to
two thirds. So the two take their steps one after the other here, and what disturbs one disturbs the other.
"""

import json
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.emoji.train import Run
from benchmarks.emoji.training import clock
from mmdit import variants
from mmdit.common.files import beside, put
from mmdit.variants import PLAIN

ROUNDS, BEFORE = 40, 2  # steps of each that are measured, and that are not: the first ones allocate


def pace(base: str, other: str, args: Namespace) -> float:
    """The median over ROUNDS of the time of a step of `other` by that of `base`; args as `train` takes them."""
    if base == other:
        return 1.0
    now, found = clock(torch.device(args.device)), list[float]()
    with TemporaryDirectory() as folder:
        runs = [
            Run(variants.load(file) if file else PLAIN, Namespace(**{**vars(args), "out": Path(folder)}))
            for file in (base, other)
        ]
        for i in range(BEFORE + ROUNDS):
            times = [now()]
            for run in runs:
                run.update()
                times.append(now())
            if i >= BEFORE:
                found.append((times[2] - times[1]) / (times[1] - times[0]))
    return float(np.median(found))


def paces(known: dict[str, str], args: Namespace, path: Path) -> dict[str, float]:
    """Of each variant `{name: file or ""}` against the first of them; kept in `path`, and not measured again.

    All by one thread, as `compare` trains.
    """
    base, threads = next(iter(known)), torch.get_num_threads()
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = dict[str, float](kept.get(base, {}))
    torch.set_num_threads(1)
    try:
        for name, file in known.items():
            if name not in found:
                found[name] = pace(known[base], file, args)
                with beside(path) as partial:
                    partial.write_text(json.dumps({**kept, base: found}, indent=1) + "\n")
                    put(partial, path)
    finally:
        torch.set_num_threads(threads)
    return {name: found[name] for name in known}
