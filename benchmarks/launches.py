"""What a step takes by each way of starting its kernels: `python -m benchmarks.launches FOLDER`.

One guided step of one picture, in turn: as it is written, its blocks compiled, either recorded once as a CUDA graph and
replayed, and each by both of PyTorch's attentions. A small picture on a fast GPU waits for Python to start kernels; the
graph shows how long it would take without. FOLDER: a diffusers folder, as for `benchmarks.speed`. On a CPU there are no
graphs, and one attention.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import speed_peers as peers
from benchmarks.parity import relative_error
from mmdit import Pipeline
from mmdit.attention import attention_by, missing
from mmdit.kernels.compiled import uncompiled

Step = Callable[[], Tensor]


def recorded(step: Step) -> Step:
    """The step as a CUDA graph: the same kernels on the same tensors, started by one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first calls is not recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def ways(pipe: Pipeline, inputs: peers.Inputs) -> dict[str, Step]:
    """Every way that there is here, by its name; what is written, as it is, comes first."""
    cuda = pipe.device.type == "cuda"
    plain = peers.ours(pipe, inputs)

    def step(backend: str, compiled: bool) -> Step:
        def run() -> Tensor:
            attention_by(pipe.transformer, backend)
            with nullcontext() if compiled else uncompiled(pipe.transformer):
                out = plain()
            assert isinstance(out, Tensor)
            return out

        return run

    found: dict[str, Step] = {}
    for backend in ("auto", "cudnn"):
        if backend != "auto" and missing(backend, pipe.device, pipe.dtype) is not None:
            continue
        for compiled in (False, True):
            name = f"{'compiled' if compiled else 'as written'}, attention {backend}"
            found[name] = step(backend, compiled)
            if cuda:
                try:
                    found[f"{name}, recorded"] = recorded(found[name])
                except RuntimeError as error:
                    print(f"left out: {name}, recorded: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="sides in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = Pipeline.load(args.folder, dtype="bf16", device=args.device, t5="off", compile=True)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    config = pipe.transformer.config
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}\n\n| size | way | ms | of the first | error to the first |")
    print("| --- | --- | ---: | ---: | ---: |")
    for size in args.size:
        generator, cells = torch.Generator().manual_seed(0), size // pipe.vae.config.downscale
        latent = torch.randn(1, config.in_channels, cells, cells, generator=generator)
        context = torch.randn(2, pipe.text.length(256), config.context_size, generator=generator)
        pooled = torch.randn(2, config.pooled_size, generator=generator)
        runs = ways(pipe, peers.Inputs(latent, context, pooled, torch.tensor(0.8)))
        values = {way: run().float().clone() for way, run in runs.items()}
        times: dict[str, list[float]] = {way: [] for way in runs}
        for _ in range(args.repeats):
            for way, run in runs.items():
                wait()
                begin = time.perf_counter()
                run()
                wait()
                times[way].append(time.perf_counter() - begin)
        first = next(iter(runs))
        for way, seconds in times.items():
            middle = statistics.median(seconds)
            ratio, error = middle / statistics.median(times[first]), relative_error(values[way], values[first])
            print(f"| {size}x{size} | {way} | {1e3 * middle:.1f} | {ratio:.2f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
