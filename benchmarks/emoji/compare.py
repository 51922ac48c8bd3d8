"""What variants gain: `python -m benchmarks.emoji.compare base benchmarks/variants/rope.py ... --seeds 3`.

Each variant is trained with each seed (`train`) and judged on the same scenes, two at a time on two cores; runs that
are there are not made again, and one that was cut off goes on. A table compares each with the base, paired by seed and
scene: held-out loss at equal steps, equal floating-point operations and equal time, and how often the pictures are
right, with 95 % bootstrap intervals. OUT/table.md and OUT/curves.png. The budget is best given in steps or operations:
beside other work a machine's seconds are of unequal worth. How long a step takes is measured apart, in turn (`pace`).
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.emoji import data, train
from benchmarks.emoji.evaluate import KINDS, draw
from benchmarks.emoji.judge import judge
from benchmarks.emoji.pace import paces
from benchmarks.emoji.scenes import random_scene
from mmdit import Pipeline, variants
from mmdit.common.files import beside, put

JUDGED = ("one subject", "two, each in its place", "two never seen together", "three")
SEED, STEPS, CFG, AT_ONCE = 500_000, 14, 3.0, 25
DRAWS = 2000  # of the bootstrap


class Curve(NamedTuple):
    """A run: what it was, its measurements, and the held-out loss of every scene at each of them."""

    told: dict[str, Any]
    lines: list[dict[str, Any]]
    losses: np.ndarray  # (measurements, scenes)
    right: dict[str, list[bool]]  # of each kind of scene, which pictures are right
    pace: float = 1.0  # time of a step, in steps of the base

    def amounts(self, unit: str) -> list[float]:
        """At each measurement: the steps, the flops, or the time in steps of the base."""
        return [line["step"] * self.pace if unit == "time" else line[unit] for line in self.lines]

    def at(self, unit: str, amount: float) -> np.ndarray:
        """The held-out losses `(scenes,)` after so many steps, flops or time, between two measurements by a line."""
        x = self.amounts(unit)
        i = min(max(int(np.searchsorted(x, amount)), 1), len(x) - 1) if len(x) > 1 else 0
        if len(x) == 1:
            return self.losses[0]
        share = float(np.clip((amount - x[i - 1]) / max(x[i] - x[i - 1], 1e-9), 0, 1))
        return (1 - share) * self.losses[i - 1] + share * self.losses[i]


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences `(seeds, scenes)`: both are drawn again, seeds as wholes."""
    rng = np.random.default_rng(0)
    seeds, scenes = differences.shape
    means = [
        differences[rng.integers(seeds, size=seeds)][:, rng.integers(scenes, size=scenes)].mean() for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)


# ---- running -------------------------------------------------------------------------------------


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def train_all(jobs: Sequence[tuple[str, str, int]], args: argparse.Namespace) -> bool:
    """Train what is missing, as many at a time as there are cores, one thread each. jobs: name, file or "", seed."""

    def one(job: tuple[str, str, int]) -> bool:
        name, file, seed = job
        folder = folder_of(args.out, name, seed)
        if (folder / "run.json").exists() and (folder / "judged.json").exists():
            return True
        folder.mkdir(parents=True, exist_ok=True)
        more = ["--variant", file] if file else []
        line = [sys.executable, "-m", "benchmarks.emoji.train", "--out", str(folder), "--seed", str(seed),
                "--budget", args.budget, "--threads", "1", "--data", str(args.out), *more, *args.more]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "train.txt").open("a") as file_:
            code = subprocess.run(line, stdout=file_, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        print(
            f"{name}, seed {seed}: {'trained' if code == 0 else f'exit code {code}, see {folder}/train.txt'}",
            flush=True,
        )
        return code == 0

    with ThreadPoolExecutor(args.at_once) as pool:
        return all(pool.map(one, jobs))


def judge_run(folder: Path, variant: str | None, count: int) -> dict[str, list[bool]]:
    """Draw `count` scenes of each kind, the same for all runs, and say which are right; kept in judged.json."""
    path = folder / "judged.json"
    if path.exists():
        return json.loads(path.read_text())
    pipe, found = Pipeline.load(folder, variant=variant, dtype="fp32"), dict[str, list[bool]]()
    for name in JUDGED:
        kind, rng = KINDS[name], Random(SEED)
        scenes, right = [random_scene(rng, **kind.scene) for _ in range(count)], list[bool]()
        for i in range(0, count, AT_ONCE):
            some = scenes[i : i + AT_ONCE]
            settings = replace(pipe.settings, seed=SEED + i, steps=STEPS, cfg=CFG)
            pictures = draw(pipe, [scene.caption for scene in some], settings)
            right += [bool(kind.right(s, judge(p, len(s.nouns)))) for s, p in zip(some, pictures)]
        found[name] = right
    with beside(path) as partial:
        partial.write_text(json.dumps(found) + "\n")
        put(partial, path)
    return found


def judge_all(jobs: Sequence[tuple[str, str, int]], args: argparse.Namespace) -> list[dict[str, list[bool]]]:
    """`judge_run` of every run, as many at a time as are trained, each by a process with one thread."""
    spawn, one = multiprocessing.get_context("spawn"), (1,)  # a copy of this process would have its threads' locks
    with ProcessPoolExecutor(args.at_once, spawn, torch.set_num_threads, one) as pool:
        folders = [folder_of(args.out, name, seed) for name, _, seed in jobs]
        return list(pool.map(judge_run, folders, [file or None for _, file, _ in jobs], [args.judged] * len(jobs)))


def curve_of(folder: Path, right: dict[str, list[bool]], pace: float) -> Curve:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with np.load(folder / "heldout.npz") as file:
        losses = np.stack([file[str(line["step"])].mean(1) for line in lines])
    return Curve(json.loads((folder / "run.json").read_text()), lines, losses, right, pace)


# ---- telling -------------------------------------------------------------------------------------


def table(runs: dict[str, list[Curve]]) -> str:
    """Markdown, the base first; differences are to the base with the same seed, less is better."""
    base = next(iter(runs.values()))
    units, every = ("step", "flops", "time"), [c for curves in runs.values() for c in curves]
    ends = {unit: min(c.amounts(unit)[-1] for c in every) for unit in units}
    rows = [
        "| variant | numbers | GFLOP a sample | time of a step | loss | at equal steps | at equal FLOPs | "
        f"at equal time | {' | '.join(JUDGED)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(JUDGED),
    ]  # fmt: skip
    for name, curves in runs.items():
        told = curves[0].told
        cells = [name, f"{told['parameters']:,}", f"{told['flops_a_step'] / told['batch'] / 1e9:.2f}",
                 f"{curves[0].pace:.2f}"]  # fmt: skip
        cells.append(f"{np.mean([c.at('step', ends['step']).mean() for c in curves]):.4f}")
        for unit in units:
            differences = np.stack([c.at(unit, ends[unit]) - b.at(unit, ends[unit]) for c, b in zip(curves, base)])
            cells.append(shown(*interval(differences), digits=4))
        for kind in JUDGED:
            own, other = (np.array([c.right[kind] for c in cs], float) for cs in (curves, base))
            rate = f"{own.mean():.0%}"
            cells.append(rate if curves is base else f"{rate} ({shown(*interval(100 * (own - other)), digits=0)})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def shown(mean: float, low: float, high: float, digits: int) -> str:
    if mean == low == high == 0:
        return "0"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def curves_picture(runs: dict[str, list[Curve]], path: Path, size: tuple[int, int] = (960, 540)) -> None:
    """Held-out loss, the mean of all seeds, by steps; the loss by a logarithm."""
    colours = ["black", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
               "#bcbd22", "#17becf", "#003f5c", "#ffa600", "#58508d"]  # fmt: skip
    points = {name: [(line["step"], float(np.mean([c.losses[i].mean() for c in cs])))
                     for i, line in enumerate(cs[0].lines) if all(len(c.lines) > i for c in cs)]
              for name, cs in runs.items()}  # fmt: skip
    every = [p for ps in points.values() for p in ps]
    right, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    image = Image.new("RGB", size, "white")
    pen, (w, h), edge = ImageDraw.Draw(image), size, 50
    place: Callable[[float, float], tuple[float, float]] = lambda x, y: (  # noqa: E731
        edge + (w - 4 * edge) * x / right,
        h - edge - (h - 2 * edge) * np.log(y / low) / max(np.log(high / low), 1e-9),
    )
    pen.rectangle((edge, edge, w - 3 * edge, h - edge), outline="#cccccc")
    for y in np.geomspace(low, high, 5):
        pen.text((6, place(0, y)[1] - 6), f"{y:.3f}", fill="black")
    for i in range(5):
        pen.text((place(right * i / 4, low)[0] - 10, h - edge + 6), f"{right * i / 4:.0f}", fill="black")
    for (name, ps), colour in zip(points.items(), colours * 9):
        pen.line([place(*p) for p in ps], fill=colour, width=2)
        pen.text((w - 3 * edge + 8, edge + 16 * list(points).index(name)), name, fill=colour)
    image.save(path)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "variants", nargs="+", help="`base`, files or modules; the first is what others are compared with"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="steps:1100", help="of each run, as `train` takes it")
    parser.add_argument("--judged", type=int, default=100, help="scenes judged of each kind")
    parser.add_argument("--out", type=Path, default=Path("out/variants"))
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="runs trained at a time, a thread each"
    )
    args, args.more = parser.parse_known_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    known = {"base" if text == "base" else variants.load(text).name: "" if text == "base" else text
             for text in args.variants}  # fmt: skip
    jobs = [(name, text, seed) for seed in range(1, args.seeds + 1) for name, text in known.items()]
    own = train.parser_of().parse_args([*args.more, "--data", str(args.out)])
    own.device = train.device_of(own.device)
    data.provide(args.out, own.size, torch.device("cpu"), own.scenes)  # once, not by every run
    if not train_all(jobs, args):
        return 1
    times = paces(known, own, args.out / "paces.json")
    runs = {name: list[Curve]() for name in known}
    for (name, _, seed), right in zip(jobs, judge_all(jobs, args)):
        runs[name].append(curve_of(folder_of(args.out, name, seed), right, times[name]))
    text = table(runs)
    (args.out / "table.md").write_text(text)
    curves_picture(runs, args.out / "curves.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
