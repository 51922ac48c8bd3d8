"""How fast this engine is beside its peers on the same weights and inputs: `python -m benchmarks.speed FOLDER`.

FOLDER is a diffusers folder, as for `benchmarks.parity`. Whatever is compared runs in turn, ours, theirs, ours, theirs;
times are medians, ratios are ours to theirs. The peers are diffusers eager, diffusers compiled block by block, and on a
CPU OpenVINO; one that is not there is left out with the reason. The step's operations are counted, the matrix rate is
measured in the same run, and their quotient is what the step would take if it were products alone.
"""

import argparse
import importlib.util
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed_peers as peers
from benchmarks.parts import parts
from mmdit import Pipeline
from mmdit.attention import attention_by
from mmdit.driver.loading import DTYPES
from mmdit.memory.devices import trim
from mmdit.memory.empty import on_meta
from mmdit.memory.host import own_bytes
from mmdit.memory.plan import told
from mmdit.model import MMDiT

STAGES = ("start", "encode", "step", "decode", "whole")
# Ratios of our time to theirs that are aimed at, on a GPU and on a CPU, and the least share of the matrix rate.
TARGETS = {
    ("step", "diffusers"): (0.5, 0.6),
    ("step", "compiled"): (0.85, 0.8),
    ("step", "openvino"): (None, 0.8),
    ("decode", "diffusers"): (0.7, 0.5),
    ("start", "diffusers"): (0.25, 0.25),
}
ATTAINED = (0.60, 0.65)  # at 1024 on a GPU, at 512 on a CPU
PRODUCT = "product"  # the matrix product that the rate is measured by
PROMPT = "a horse and a bear on a green background"


class Grown(NamedTuple):
    """A row of a stage: how much work it is, and what it took."""

    what: str
    work: float
    seconds: dict[str, float]
    beyond: dict[str, int]  # bytes at the peak, beyond those that were taken before


class Table:
    """Rows of times in turn, printed as they come, and last how those of one kind grow."""

    def __init__(self, cuda: bool, repeats: int) -> None:
        self.cuda, self.repeats = cuda, repeats
        self.grown: dict[str, list[Grown]] = {}  # by stage
        print("| stage | what | ours | peer | ratio | target |\n| --- | --- | --- | --- | --- | --- |")

    def measure(
        self, stage: str, what: str, runs: dict[str, Callable[[], object]], clock: Any = None, work: float = 0
    ) -> dict[str, float]:
        """runs: ours first. clock: seconds of one run, if they are not simply counted. Returns the medians.

        work: in any unit, how much it is; such rows are compared at the end.
        """
        times: dict[str, list[float]] = {name: [] for name in runs}
        # What is made or compiled at the first call is not timed; its memory is counted.
        beyond = {} if clock else {name: self.beyond(run) for name, run in runs.items()}
        for _ in range(self.repeats):
            for name, run in runs.items():
                times[name].append(clock(run) if clock else self.timed(run))
        middle = {name: statistics.median(values) for name, values in times.items()}
        if work:
            self.grown.setdefault(stage, []).append(Grown(what, work, middle, beyond))
        ours = middle["ours"]
        for name, other in middle.items():
            if name in ("ours", PRODUCT):
                continue
            aim = TARGETS.get((stage, name), (None, None))[0 if self.cuda else 1]
            ratio = f"{ours / other:.2f}"
            print(f"| {stage} | {what} | {ours:.3f} s | {name} {other:.3f} s | {ratio} | {aim or ''} |", flush=True)
        return middle

    def timed(self, run: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def beyond(self, run: Callable[[], object]) -> int:
        """Bytes that a run takes at its peak beyond those that are taken before it."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        trim()
        before, seen, done = own_bytes(), [0], Event()

        def watch() -> None:
            while not done.wait(0.01):
                seen.append(own_bytes() - before)

        watcher = Thread(target=watch)
        watcher.start()
        try:
            run()
        finally:
            done.set()
            watcher.join()
        return max(seen)

    def growth(self) -> None:
        """How time and memory grow with the work, each against the first row of its stage."""
        for stage, rows in self.grown.items():
            print(f"\n| {stage} | work | ours: time | memory | diffusers: time | memory |\n| --- {'| --- ' * 5}|")
            first = rows[0]
            for row in rows:
                cells = [f"x{row.work / first.work:.2f}"]
                for name in ("ours", "diffusers"):
                    known = name in row.seconds and name in first.seconds
                    cells.append(f"x{row.seconds[name] / first.seconds[name]:.2f}" if known else "")
                    cells.append(told(row.beyond[name]) if known else "")
                print(f"| {row.what} | {' | '.join(cells)} |")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def operations(pipe: Pipeline, size: int, batch: int, tokens: int) -> float:
    """Floating-point operations of one guided step, counted where no memory is needed."""
    config = pipe.transformer.config
    model, cells = on_meta(MMDiT, config, pipe.dtype), size // pipe.vae.config.downscale
    attention_by(model, "math")  # whose products are counted
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latent = torch.empty(2 * batch, config.in_channels, cells, cells, dtype=pipe.dtype)
        context = torch.empty(2 * batch, tokens, config.hidden_size, dtype=pipe.dtype)
        positions = torch.empty(1, (cells // config.patch_size) ** 2, config.hidden_size)
        parts: list[Any] = [*model.joint_blocks, model.final_layer]
        c = torch.empty(2 * batch, config.hidden_size, dtype=pipe.dtype)
        before = [part.modulation(c) for part in parts]
        known = counter.get_total_flops()
        model.flow(latent, positions, context, before)
    return float(counter.get_total_flops() - known)


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product, and its operations: what the machine can do at that moment."""
    rows, width, times = (8192, 8192, 4) if device.type == "cuda" else (2048, 1536, 25)
    a, b = (torch.randn(n, m, device=device, dtype=dtype) for n, m in ((rows, width), (width, 4 * width)))
    c = a.new_empty(rows, 4 * width)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=c)

    return run, 2.0 * times * rows * width * 4 * width


def step(table: Table, pipe: Pipeline, others: dict[str, peers.Maker], size: int, batch: int) -> None:
    """One guided step of `batch` pictures, and the share of the matrix rate that ours reaches."""
    config, cells = pipe.transformer.config, size // pipe.vae.config.downscale
    tokens = pipe.text.length(256)
    generator = torch.Generator().manual_seed(0)
    inputs = peers.Inputs(
        torch.randn(batch, config.in_channels, cells, cells, generator=generator),
        torch.randn(2, tokens, config.context_size, generator=generator),
        torch.randn(2, config.pooled_size, generator=generator),
        torch.tensor(0.8),
    )
    runs = {"ours": peers.ours(pipe, inputs)}
    for name, make in others.items():
        try:
            runs[name] = make(inputs)
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"left out: {name}: {' '.join(str(error).split())[:200]}")
    runs[PRODUCT], large = product(pipe.device, pipe.dtype)
    seconds = table.measure("step", f"{size}x{size}, {batch} pictures", runs, work=batch * size**2)
    count, rate = operations(pipe, size, batch, tokens), large / seconds[PRODUCT]
    job = pipe.job(settings_of(pipe, size, batch))
    peak = told(pipe.planner.costs.activations.denoising("transformer", job, batch))
    print(
        f"| step | roofline: {count / 1e12:.2f} TFLOP at {rate / 1e12:.2f} TFLOP/s | {count / rate:.3f} s | "
        f"attained {count / rate / seconds['ours']:.0%} | | {ATTAINED[0 if table.cuda else 1]:.0%} |\n"
        f"| step | memory of the computation, predicted | {peak} | | | |\n"
        f"| step | where ours goes: {parts(runs['ours'], table.cuda)} | | | | |",
        flush=True,
    )


def settings_of(pipe: Pipeline, size: int, batch: int, steps: int = 2) -> Any:
    own = {"prompt": PROMPT, "width": size, "height": size, "count": batch, "steps": steps}
    return pipe.check(replace(pipe.settings, **own))


def start(table: Table, args: argparse.Namespace) -> None:
    """From the start of a process until the sampler first calls the transformer, weights in the page cache."""

    def clock(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        process = run()
        assert isinstance(process, subprocess.Popen) and process.stdout
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
        process.wait()
        if not line.startswith(b"first step"):
            raise SystemExit("error: a process did not reach its first step")
        return seconds

    def child(who: str) -> Callable[[], object]:
        given = (who, str(args.folder), str(args.size[0]), args.dtype, args.device)
        line = [sys.executable, "-m", "benchmarks.first_step", *given]
        return lambda: subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    runs = {"ours": child("ours"), "diffusers": child("diffusers")}
    for run in runs.values():
        clock(run)
    table.measure("start", f"{args.size[0]}x{args.size[0]}, without T5", runs, clock)


def encode(table: Table, pipe: Pipeline, diffusers: Any) -> None:
    def theirs() -> object:
        return diffusers.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=True, negative_prompt="")

    table.measure(
        "encode", "prompt and negative prompt", {"ours": lambda: pipe.encode([PROMPT, ""], 256), "diffusers": theirs}
    )


def decode(table: Table, pipe: Pipeline, diffusers: Any, size: int) -> None:
    cells = size // pipe.vae.config.downscale
    latent = torch.randn(1, pipe.vae.config.latent_channels, cells, cells, generator=torch.Generator().manual_seed(0))
    scale, shift = diffusers.vae.config.scaling_factor, diffusers.vae.config.shift_factor

    def theirs() -> Tensor:
        given = (latent / scale + shift).to(pipe.device, pipe.dtype)
        return diffusers.image_processor.postprocess(diffusers.vae.decode(given, return_dict=False)[0], "pt").cpu()

    table.measure("decode", f"{size}x{size}", {"ours": lambda: pipe.decode(latent), "diffusers": theirs}, work=size**2)


def whole(table: Table, pipe: Pipeline, diffusers: Any, size: int, batch: int, steps: int) -> None:
    def theirs() -> object:
        sides = {"width": size, "height": size, "num_images_per_prompt": batch, "num_inference_steps": steps}
        return diffusers(PROMPT, negative_prompt="", guidance_scale=4.5, **sides)

    runs = {"ours": lambda: pipe.run(settings_of(pipe, size, batch, steps)), "diffusers": theirs}
    table.measure("whole", f"{size}x{size}, {batch} pictures, {steps} steps", runs, work=batch * size**2 * steps)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024, 1440], help="sides in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures at a time, as 1 4 16")
    parser.add_argument("--steps", type=int, nargs="+", default=[2], help="of whole pictures")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--peers", nargs="*", choices=peers.STEPS, default=tuple(peers.STEPS), help="for the step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="ours compiled too")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.folder}, {args.dtype}, {device}, torch {torch.__version__}, {'' if args.compile else 'not '}compiled")
    if importlib.util.find_spec("diffusers") is None:
        raise SystemExit("error: nothing to compare with: diffusers is not installed")
    table = Table(args.device == "cuda", args.repeats)
    if "start" in args.stages:
        start(table, args)
    if set(args.stages) == {"start"}:
        return
    own = {"dtype": args.dtype, "device": args.device, "t5": "off", "compile": args.compile}
    pipe, diffusers = Pipeline.load(args.folder, **own), peers.diffusers(args.folder, args.dtype, args.device)
    others = {name: make(diffusers, pipe) for name, make in peers.STEPS.items() if name in args.peers}
    if "encode" in args.stages:
        encode(table, pipe, diffusers)
    for size in args.size:
        for batch in args.batch:
            if "step" in args.stages:
                step(table, pipe, others, size, batch)
            for steps in args.steps if "whole" in args.stages else ():
                whole(table, pipe, diffusers, size, batch, steps)
        if "decode" in args.stages:
            decode(table, pipe, diffusers, size)
    table.growth()


if __name__ == "__main__":
    main()
