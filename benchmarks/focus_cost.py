"""What keeping subjects apart takes, beside plain sampling: memory by the plans, and time on what is at hand.

    python -m benchmarks.focus_cost           # memory, predicted for SD3.5-Medium on a GPU; needs neither GPU nor files
    python -m benchmarks.focus_cost FOLDER    # and time: plain and pushed steps in turn; anonymous memory on a CPU

FOLDER: a diffusers folder of full size, published or by `python -m benchmarks.random_checkpoint`. The time of a picture
is that of 28 steps, those above the default of `--focus-until` pushed. All in bfloat16 with guidance.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.memory import TARGETS, full_size, job, watched
from mmdit import Pipeline
from mmdit.driver.sampling import sigmas_of
from mmdit.driver.settings import Settings
from mmdit.memory.planner import Planner

PROMPT, FOCUS, SHIFT, STEPS = "a horse and a bear in a forest", "horse; bear", 3.0, 28
TARGET = "targets: memory 1.5, time 1.35"


def predicted() -> None:
    """Peaks of a GPU, its libraries' workspace among it, by how the transformer is there; decoded in strips."""
    device = torch.device("cuda")
    planner = Planner(full_size(device), device, torch.bfloat16)
    ladder = planner.ladder()
    print("| picture | transformer | plain | pushed | ratio | while it denoises | pushed | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for target in TARGETS[:2]:
        plain, most = job(target), (10**12, int(target.staged), int(target.streamed))
        for modes, budget in zip((ladder[0], *ladder[-2:]), most):
            plans = [planner.predict(modes, plain._replace(steep=steep), 1, budget) for steep in (False, True)]
            cells = [f"{target.width}x{target.height}", str(modes["transformer"])]
            for peaks in ([plan.peak for plan in plans], [plan.peaks["denoise"] for plan in plans]):
                cells += [f"{peak / 1e9:.2f} GB" for peak in peaks] + [f"{peaks[1] / peaks[0]:.2f}"]
            print(f"| {' | '.join(cells)} |")


def share_pushed() -> float:
    """The share of a picture's steps that are pushed by default."""
    s = Settings(PROMPT, steps=STEPS)
    levels = sigmas_of(s, SHIFT)[:-1]
    return float((levels >= s.focus_until).float().mean())


def step_seconds(pipe: Pipeline, side: int, pushed: bool) -> list[float]:
    """Of two steps, without what the first alone costs."""
    times: list[float] = []
    focus = {"focus": FOCUS, "focus_until": 0.0} if pushed else {}

    def on_step(_: object) -> None:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    pipe(PROMPT, width=side, height=side, steps=3, on_step=on_step, **focus)
    return [b - a for a, b in pairwise(times)]


def measured(pipe: Pipeline, sides: list[int], repeats: int) -> None:
    share = share_pushed()
    print(f"| picture | plain step | pushed step | ratio | picture of {STEPS} steps, {share:.0%} pushed |")
    print("| --- | --- | --- | --- | --- |")
    for side in sides:
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for pushed, seconds in found.items():
                seconds += step_seconds(pipe, side, pushed)
        plain, pushed = (median(seconds) for seconds in found.values())
        ratio = pushed / plain
        print(f"| {side}x{side} | {plain:.3f} s | {pushed:.3f} s | {ratio:.2f} | {1 + share * (ratio - 1):.2f} |")


def on_cpu(folder: Path, side: int, memory: list[str], t5: str) -> None:
    """Anonymous memory of a process that draws one step."""
    size = ["--width", str(side), "--height", str(side), "--steps", "1", "--t5", t5]
    run = [
        sys.executable,
        "-m",
        "mmdit.run",
        PROMPT,
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--dtype",
        "bf16",
        *size,
    ]
    print("| --memory | plain | pushed | ratio |\n| --- | --- | --- | --- |")
    with TemporaryDirectory() as out:
        for budget in memory:
            line = [*run, "--memory", budget, "--out", f"{out}/picture.png"]
            peaks = [watched([*line, *more])[0] for more in ((), ("--focus", FOCUS))]
            told = " | ".join(f"{peak / 1e9:.2f} GB" for peak in peaks)
            print(f"| {budget} | {told} | {peaks[1] / peaks[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="sides of the pictures that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--t5", default="on", help="as `mmdit.run` takes it")
    parser.add_argument(
        "--memory", nargs="+", default=["16GB", "2GB"], help="budgets, a CPU's peak of each is measured"
    )
    args = parser.parse_args()
    print(f"torch {torch.__version__}; {TARGET}\n\nPredicted, on a GPU:\n")
    predicted()
    if args.folder is None:
        return
    pipe = Pipeline.load(args.folder, dtype="bf16", t5=args.t5)
    print(f"\nTime, on {'the GPU' if pipe.device.type == 'cuda' else f'{torch.get_num_threads()} threads of a CPU'}:\n")
    measured(pipe, args.sizes, args.repeats)
    if pipe.device.type == "cpu":
        del pipe
        print(f"\nAnonymous memory, {args.sizes[0]}x{args.sizes[0]}:\n")
        on_cpu(args.folder, args.sizes[0], args.memory, args.t5)


if __name__ == "__main__":
    main()
