"""How much memory a picture takes, predicted and measured, against what is to be reached.

    python -m benchmarks.memory                     # predictions for SD3.5-Medium on a GPU; needs neither GPU nor files
    python -m benchmarks.memory FOLDER              # also measured, on the GPU if there is one, else on the CPU
    python -m benchmarks.memory FOLDER --peer       # and diffusers, on the CPU

FOLDER: a diffusers folder of full size, published or by `python -m benchmarks.random_checkpoint`. On a GPU the peak is
what PyTorch's allocator handed out; on a CPU it is the process's anonymous memory, looked at 50 times a second, which
leaves out the mapped file; options that are not known here go to `mmdit.run`, such as --t5xxl FILE. All in bfloat16,
with guidance, both texts and all 256 tokens of T5.
"""

import argparse
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.config import SD35_MEDIUM
from mmdit.driver.building import MODULES
from mmdit.memory.empty import on_meta
from mmdit.memory.host import own_bytes
from mmdit.memory.plan import Job, Plan
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Network
from text_encoders import CLIP_G, CLIP_L, T5_XXL
from vae import SD3_VAE

CONFIGS: dict[str, Any] = {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5_XXL, "transformer": SD35_MEDIUM, "vae": SD3_VAE}


class Target(NamedTuple):
    """Bytes that a picture may take at the peak, by how the transformer is there while it denoises."""

    width: int
    height: int
    staged: float
    streamed: float


TARGETS = [
    Target(512, 512, 3.3e9, 1.0e9),
    Target(1024, 1024, 3.6e9, 1.3e9),
    Target(1440, 1440, 4.0e9, 1.7e9),
    Target(1920, 1024, 4.0e9, 1.7e9),
]
BETWEEN = (1.2e9, 2.0e9, 3.0e9)  # budgets for which some of the blocks stay
CPU_TARGET = 3.0e9  # anonymous memory for 512x512 with T5


class Unread:
    """Stands for a network's file: right names, sizes and dtype, and tensors that nobody has written to."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}

    def __call__(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=torch.bfloat16)

    original = __call__

    def dtype(self, _: str) -> torch.dtype:
        return torch.bfloat16

    def nbytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    def is_mapped(self, _: str) -> bool:
        return False

    is_put = is_mapped
    put_bytes = 0


def full_size(device: torch.device) -> dict[str, Network]:
    """The networks of SD3.5-Medium in bfloat16, without files."""
    networks = {}
    for name, config in CONFIGS.items():
        module = on_meta(MODULES[name][0], config, torch.bfloat16)
        source: Any = Unread(module)
        networks[name] = Network(name, module, source, device)
    return networks


def job(target: Target) -> Job:
    return Job(target.height // 8, target.width // 8, count=1, steps=28, texts=2, t5_length=256)


def predicted() -> None:
    """The plans for a GPU, the workspace of its libraries included."""
    device = torch.device("cuda")
    planner = Planner(full_size(device), device, torch.bfloat16)
    *_, staged, streamed = planner.ladder()
    print("| picture | transformer | target | predicted | encode | denoise | decode | strips |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for target in TARGETS:
        for modes, most in ((staged, target.staged), (streamed, target.streamed)):
            print(row(target, planner.predict(modes, job(target), 1, int(most)), f"{most / 1e9:.1f} GB"))
        for budget in BETWEEN:
            print(row(target, planner.plan(job(target), int(budget)), f"budget {budget / 1e9:.1f} GB"))


def row(target: Target, plan: Plan, most: str) -> str:
    peaks = [f"{plan.peaks[stage] / 1e9:.2f}" for stage in ("encode", "denoise", "decode")]
    strip = "whole" if plan.strip is None else f"{plan.strip} rows"
    way = f"{plan.modes['transformer']}{f', {plan.kept} blocks stay' if plan.kept else ''}"
    cells = [f"{target.width}x{target.height}", way, most]
    return f"| {' | '.join([*cells, f'{plan.peak / 1e9:.2f} GB', *peaks, strip])} |"


def on_cuda(folder: Path, steps: int) -> None:
    """Peaks by PyTorch's allocator, and a step's time against that with everything resident."""
    from mmdit import Pipeline

    pipe = Pipeline.load(folder, device="cuda", dtype="bf16")
    print("| picture | transformer | target | predicted | measured | step | against resident |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    resident, *_, staged, streamed = pipe.planner.ladder()
    for target in TARGETS:
        size = {"width": target.width, "height": target.height, "steps": steps}
        settings = pipe.check(replace(pipe.settings, prompt="a horse and a bear", **size))
        plans = [pipe.planner.predict(resident, pipe.job(settings), 1, 10**12)]
        plans += [pipe.planner.predict(staged, pipe.job(settings), 1, int(target.staged))]
        plans += [pipe.planner.predict(streamed, pipe.job(settings), 1, int(target.streamed))]
        base = 0.0
        for plan, most in zip(plans, (None, target.staged, target.streamed)):
            pipe.plan_for = lambda _, plan=plan: plan  # type: ignore[method-assign]
            pipe.follow(plan, pipe.job(settings))
            pipe.residency.use(None)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds = step_seconds(pipe, settings)
            peak, base = torch.cuda.max_memory_allocated(), base or seconds
            told = "" if most is None else f"{most / 1e9:.1f} GB"
            print(
                f"| {target.width}x{target.height} | {plan.modes['transformer']} | {told} | {plan.peak / 1e9:.2f} GB "
                f"| {peak / 1e9:.2f} GB | {seconds * 1e3:.1f} ms | {seconds / base:.3f} |"
            )


def step_seconds(pipe: Any, settings: Any) -> float:
    """The median of the steps of a whole run, the first left out."""
    times: list[float] = []

    def watch(*_: object) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    hook = pipe.transformer.final_layer.register_forward_hook(watch)
    try:
        pipe.run(settings)
    finally:
        hook.remove()
    return median(b - a for a, b in pairwise(times[1:]))


# ---- on a CPU ------------------------------------------------------------------------------------

DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
pipe("a horse and a bear", width=512, height=512, num_inference_steps=1, guidance_scale=4.5)
"""


def on_cpu(folder: Path, budgets: list[str], more: list[str], peer: bool) -> None:
    """Peaks of anonymous memory, each in a process of its own: 512x512 and one step; more steps take no more."""
    size = ["--width", "512", "--height", "512", "--steps", "1", "--device", "cpu", "--dtype", "bf16"]
    run = [sys.executable, "-m", "mmdit.run", "a horse and a bear", "--model", str(folder), *size, *more]
    print("| engine | target | predicted | measured |")
    print("| --- | --- | --- | --- |")
    with TemporaryDirectory() as out:
        for budget in budgets:
            peak, text = watched([*run, "--memory", budget, "--out", f"{out}/picture.png"])
            told = re.search(r"plan: (\S+ .B)", text)
            cells = [f"this engine, --memory {budget}", f"{CPU_TARGET / 1e9:.1f} GB", told[1] if told else ""]
            print(f"| {' | '.join(cells)} | {peak / 1e9:.2f} GB |", flush=True)
    if peer:
        peak, _ = watched([sys.executable, "-c", DIFFUSERS, str(folder)])
        print(f"| diffusers | | | {peak / 1e9:.2f} GB |", flush=True)


def watched(command: list[str]) -> tuple[int, str]:
    """The most anonymous memory that a process has had, in bytes, and what it wrote; CalledProcessError if it fails."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            peak = max(peak, own_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return peak, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run on a GPU")
    parser.add_argument("--memory", nargs="+", default=["16GB", "2GB"], help="budgets on a CPU")
    parser.add_argument("--peer", action="store_true", help="measure diffusers too (CPU)")
    args, more = parser.parse_known_args()
    print(f"torch {torch.__version__}\n\nPredicted, on a GPU:\n")
    predicted()
    if args.folder is None:
        return
    if torch.cuda.is_available():
        print(f"\nMeasured on {torch.cuda.get_device_name()}:\n")
        on_cuda(args.folder, args.steps)
    else:
        print("\nMeasured on the CPU, anonymous memory for 512x512:\n")
        on_cpu(args.folder, args.memory, more, args.peer)


if __name__ == "__main__":
    main()
