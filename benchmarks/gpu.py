"""All that is waiting for a GPU, in one call: `python -m benchmarks.gpu --out FOLDER`.

In this order: what the machine is, a full-size checkpoint with random values, the tests that need CUDA, the streams
under PyTorch's sanitizer, parity in float32 and bfloat16, memory measured against predicted, a training, a step beside
diffusers as written and compiled, ways to start its kernels, whole pictures, start, decoding, keeping subjects apart.
Each is a process of its own with its share of `--minutes`. What it prints lies in FOLDER/NAME.txt while it runs, and
after each FOLDER/gpu.md says how it ended: a run that is cut off still tells.

It needs PyTorch with CUDA and the packages of this project, and for the comparisons diffusers, transformers and pytest.
Where a machine has no network, carry their wheels along and name the folder in PYTHONPATH. A part whose package is
missing is left out with the reason. `--device cpu --size tiny` rehearses it.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TOKENIZERS = ROOT / "tests" / "data" / "tokenizers.tar.xz"  # the published ones


class Part(NamedTuple):
    """One process of the run."""

    name: str
    what: str
    command: str  # after `python -m`
    share: float  # of all the time, at most
    needs: tuple[str, ...] = ()  # packages
    environment: dict[str, str] = {}  # noqa: RUF012  # added to this process's own


def parts(device: str, size: str, work: Path) -> list[Part]:
    """The run, in its order. work: a folder with the tokenizers, for the checkpoint."""
    full, folder = size == "full", shlex.quote(str(work / "model"))
    model, sides, two = ("sd35-medium", "512 1024 1440", "512 1024") if full else ("toy", "64", "64")
    first, steps, repeats = ("512", 28, 3) if full else ("64", 2, 1)
    peers = "diffusers compiled --compile" if full else "diffusers"
    weights = f"benchmarks.random_checkpoint {folder} --model {model} --dtype bf16 --clips --t5 --device {device}"
    tests = "pytest -q -m gpu -p no:cacheprovider"
    parity = f"benchmarks.parity {folder} --device {device} --steps 2 --t5-length 77"
    parity += " --width 1024 --height 1024" if full else " --width 64 --height 64"
    speed = f"benchmarks.speed {folder} --device {device} --repeats {repeats}"
    memory = f"benchmarks.memory {folder}{'' if device == 'cuda' else ' --memory 1GB'}"
    focus = f"{folder} --sizes {two} --repeats {repeats}" + ("" if full else " --memory 1GB")
    demo = f"benchmarks.parity weights/demo --device {device} --steps {steps}"
    train = f"benchmarks.emoji.train --out {shlex.quote(str(work / 'trained'))} --data {shlex.quote(str(work))}"
    few = "--budget steps:2 --scenes 260 --batch 8 --pictures 2"
    train += f" --device {device} {'--budget 0.9min --scenes 3000' if full else few}"
    both, test, ordered = ("diffusers", "transformers"), ("pytest",), {"TORCH_CUDA_SANITIZER": "1"}
    return [
        Part("machine", "what it is", "benchmarks.gpu --describe", 0.1),
        Part("weights", "a checkpoint of random values", f"{weights} --tokenizers {shlex.quote(str(work))}", 0.25),
        Part("tests", "tests that need a GPU", tests, 0.25, test),
        Part("sanitizer", "streams, each access checked", f"{tests} tests/test_streaming.py", 0.15, test, ordered),
        Part("parity-demo", "the demo against diffusers, float32", demo, 0.2, both),
        Part("parity-fp32", "against diffusers, float32, without T5", f"{parity} --t5 off", 0.2, both),
        Part("parity-bf16", "against diffusers, bfloat16", f"{parity} --dtype bf16 --direct", 0.2, both),
        Part("memory", "peaks, measured against predicted", memory, 0.3),
        Part("train", "a small model, as variants are trained", train, 0.2),
        Part("step", "a guided step", f"{speed} --stages step --size {sides} --peers diffusers", 0.2, both),
        Part("compiled", "both sides compiled", f"{speed} --stages step --size {two} --peers {peers}", 0.3, both),
        Part("launches", "ways to start a step's kernels", f"benchmarks.launches {folder} --size {two}", 0.3),
        Part("whole", "whole pictures", f"{speed} --stages whole --size {two} --steps {steps}", 0.2, both),
        Part("start", "from nothing to the first step", f"{speed} --stages start --size {first}", 0.2, both),
        Part("decode", "decoding", f"{speed} --stages decode --size {sides}", 0.1, both),
        Part("focus", "keeping subjects apart, time of a step", f"benchmarks.focus_cost {focus}", 0.2),
    ]


def describe() -> None:
    """What this machine is."""
    import torch

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores of {processor()}")
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        print(f"{about.name}, {about.total_memory / 1e9:.1f} GB, compute capability {about.major}.{about.minor}")
        print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        print("no GPU that PyTorch can use")
    for name in ("diffusers", "transformers", "triton", "flash_attn", "xformers", "pytest"):
        print(f"{name}: {'there' if importlib.util.find_spec(name) else 'not there'}")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def run(part: Part, out: Path, seconds: float) -> str:
    """Have a part done in at most so many seconds; returns how it ended."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return f"left out: {', '.join(missing)} not installed"
    line = [sys.executable, "-m", *shlex.split(part.command)]
    begin = time.monotonic()
    with (out / f"{part.name}.txt").open("w") as file:
        file.write(f"$ python -m {part.command}\n")
        file.flush()
        environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"cut off after {seconds:.0f} s"
    took = f"{time.monotonic() - begin:.0f} s"
    if part.command.startswith("pytest") and code == 5:  # pytest's own for no tests
        return f"no tests ({took})"
    return f"done in {took}" if code == 0 else f"FAILED with exit code {code} after {took}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the checkpoint")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts; `weights` is added where it is needed")
    parser.add_argument("--describe", action="store_true", help="say what this machine is, and nothing else")
    args = parser.parse_args()
    if args.describe:
        describe()
        return 0
    if args.out is None:
        parser.error("--out FOLDER is needed")
    work = Path(tempfile.mkdtemp(prefix="mmdit-gpu-"))
    try:
        wanted = parts(args.device, args.size, work)
        unknown = set(args.only or ()) - {part.name for part in wanted}
        if unknown:
            parser.error(f"--only: no part {', '.join(sorted(unknown))}: there are {', '.join(p.name for p in wanted)}")
        if args.only:
            wanted = [part for part in wanted if part.name in {"machine", "weights", *args.only}]
        with tarfile.open(TOKENIZERS) as files:
            files.extractall(work, filter="data")
        return 0 if do(wanted, args.out, args.minutes) else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def do(wanted: Sequence[Part], out: Path, minutes: float) -> bool:
    """All parts in turn; writes gpu.md after each. Returns whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    rows, end, good = [], time.monotonic() + 60 * minutes, True
    for part in wanted:
        left = end - time.monotonic()
        told = run(part, out, min(left, 60 * minutes * part.share)) if left > 1 else "no time was left"
        good &= not told.startswith(("FAILED", "cut off", "no time"))
        rows.append(f"| {part.name} | {part.what} | {told} |")
        print(f"{part.name}: {told}", flush=True)
        text = "# What ran\n\n| part | what | how it ended |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
        (out / "gpu.md").write_text(text)
    return good


if __name__ == "__main__":
    sys.exit(main())
