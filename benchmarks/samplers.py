"""How near solvers and schedules come to the flow's end: `python -m benchmarks.samplers --out FILE.md`.

The demo model draws the same pictures from the same noise by every solver without noise, on every schedule, in few
evaluations of the network. Printed is how far the latents are from those of very many steps: the norm of the difference
over the norm of these. Solvers that add noise draw other pictures, so that no distance can be taken; the demo's judge
says how many of theirs show what was asked for, beside those of two solvers without noise.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from benchmarks.emoji.judge import interval, judge
from benchmarks.emoji.scenes import random_scene
from mmdit import Pipeline
from samplers import SCHEDULES, SOLVERS
from samplers.noise import going_on

NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
SETTLED = [name for name in SOLVERS if name not in NOISY]
COUNTS = (4, 8, 16, 28)  # evaluations, on every schedule
MORE = 50  # on the first schedule only
REFERENCE, LONG = "lms", 300  # the solver and the steps of what is taken for exact, on `linear`
JUDGED = (8, 28)
SEED = 80_000_000


class Bench:
    """Pictures to be drawn again and again: their texts, encoded once, and their noise."""

    def __init__(self, pipe: Pipeline, captions: Sequence[str]) -> None:
        s = pipe.check(pipe.settings)
        assert s.width and s.height and s.t5_length and s.cfg is not None
        self.pipe, self.cfg, self.count = pipe, s.cfg, len(captions)
        self.cond, self.uncond = pipe.encode(list(captions), s.t5_length), pipe.encode([""], s.t5_length)
        self.noise = pipe.noise(s.width, s.height, range(SEED, SEED + self.count))

    @torch.no_grad()
    def draw(self, solver: str, schedule: str, steps: int) -> Tensor:
        """The latents at the end, `(count, C, h, w)`."""
        way, sigmas = SOLVERS[solver], SCHEDULES[schedule](steps, self.pipe.shift)
        velocity = self.pipe.velocity(self.cond, self.uncond, self.cfg, self.count, way.levels(sigmas).tolist())
        sources = [going_on(SEED + i, self.noise[i : i + 1]) for i in range(self.count)]
        return way(
            velocity, self.noise, sigmas,
            noise=lambda like: torch.cat([source(like[i : i + 1]) for i, source in enumerate(sources)]),
        )  # fmt: skip


def steps_of(solver: str, evaluations: int) -> int:
    """The most steps that take no more evaluations: Heun's method takes two a step, and one for the last."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


def far(latents: Tensor, exact: Tensor) -> float:
    return float((latents - exact).norm() / exact.norm())


def distances(bench: Bench) -> list[str]:
    """Two tables: each solver on the schedule of the published pipelines, and the best of every schedule."""
    exact, half = bench.draw(REFERENCE, "linear", LONG), bench.draw(REFERENCE, "linear", LONG // 2)
    first, *_ = SCHEDULES
    found: dict[tuple[str, str, int], float] = {}
    for solver in SETTLED:
        for schedule in SCHEDULES:
            for count in (*COUNTS, MORE) if schedule == first else COUNTS:
                found[solver, schedule, count] = far(bench.draw(solver, schedule, steps_of(solver, count)), exact)
        print(f"{solver} done", flush=True)
    lines = [
        f"Distance from `{REFERENCE}` in {LONG} steps on `linear`; that in {LONG // 2} is {far(half, exact):.1e} away.",
        "", f"On `{first}`, by evaluations of the network:", "",
        table("solver", [*COUNTS, MORE]), rule(len(COUNTS) + 1),
    ]  # fmt: skip
    lines += [table(f"`{s}`", [shown(found[s, first, n]) for n in (*COUNTS, MORE)]) for s in SETTLED]
    for count in COUNTS:
        lines += [
            "",
            f"In {count} evaluations, by schedule:",
            "",
            table("solver", list(SCHEDULES)),
            rule(len(SCHEDULES)),
        ]
        lines += [table(f"`{s}`", [shown(found[s, spaced, count]) for spaced in SCHEDULES]) for s in SETTLED]
    return lines


def judged(pipe: Pipeline, count: int) -> list[str]:
    """A table of how many pictures are right, by solver and evaluations."""
    scenes = [random_scene(Random(SEED + i), count=1 + i % 2) for i in range(count)]
    bench = Bench(pipe, [scene.caption for scene in scenes])
    lines = [
        f"Right of {count} scenes of one or two subjects, on `sgm_uniform`, with the interval of 95 %:", "",
        table("solver", list(JUDGED)), rule(len(JUDGED)),
    ]  # fmt: skip
    for solver in ("euler", "dpmpp_2m", *NOISY):
        cells = []
        for steps in JUDGED:
            pictures = pipe.decode(bench.draw(solver, "sgm_uniform", steps)).numpy()
            verdicts = [judge(picture, len(scene.nouns)) for picture, scene in zip(pictures, scenes)]
            right = sum(v.nouns == scene.nouns and v.tints == scene.tints for v, scene in zip(verdicts, scenes))
            low, high = interval(right, count)
            cells.append(f"{right} ({low:.0%} to {high:.0%})")
        lines.append(table(f"`{solver}`", cells))
        print(f"{solver} judged", flush=True)
    return lines


def table(head: str, cells: Sequence[object]) -> str:
    return f"| {head} | {' | '.join(map(str, cells))} |"


def rule(columns: int) -> str:
    return "| --- |" + " --- |" * columns


def shown(distance: float) -> str:
    return f"{distance:.3f}" if distance >= 0.01 else f"{distance:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder (default: the demo model)")
    parser.add_argument("--pictures", type=int, default=2, help="of which distances are taken")
    parser.add_argument("--scenes", type=int, default=16, help="that are judged")
    parser.add_argument("--out", type=Path, default=None, help="write the tables here too")
    args = parser.parse_args()
    start, processor = time.perf_counter(), time.process_time()
    pipe = Pipeline.load(args.model, dtype="fp32")
    captions = [random_scene(Random(SEED + i), count=2).caption for i in range(args.pictures)]
    lines = distances(Bench(pipe, captions))
    if args.scenes:
        lines += ["", *judged(pipe, args.scenes)]
    took = f"{time.perf_counter() - start:.0f} s, {time.process_time() - processor:.0f} s of processors"
    head = [
        "# Solvers and schedules on the demo model", "",
        f"`python -m benchmarks.samplers`: {args.pictures} pictures ({'; '.join(captions)}), the model's own guidance "
        f"and size, float32. It took {took}.", "",
    ]  # fmt: skip
    text = "\n".join([*head, *lines, ""])
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
