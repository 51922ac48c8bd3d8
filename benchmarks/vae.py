"""The autoencoder's decode, timed: `OMP_WAIT_POLICY=passive python -m benchmarks.vae 512x512 --dtype bf16`.

SD3's full-size decoder with random weights on the CPU: diffusers' AutoencoderKL, this engine's plain decode, the same
with channels last, and strips of several heights, all with the same weights, one after the other in every round.
Printed are the medians over the rounds, of wall-clock and of processor seconds (all threads together, which other work
on the machine disturbs less), and their ratio to diffusers'; what one large convolution and one large matrix product
attain; and the plain decode's operations per second of each, as a part of that convolution's rate.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from mmdit.driver.loading import DTYPES
from vae.autoencoder import SD3_VAE, Autoencoder
from vae.cpu import cpu_rows
from vae.strips import decode_in_strips
from weights.keymap import VAE, revert, to_diffusers
from weights.published import vae_config

Seconds = tuple[float, float]  # wall clock, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", help="WIDTHxHEIGHT of the picture")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="strip heights besides the default")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        report(width, height, DTYPES[args.dtype], args.rows, args.rounds)


@torch.no_grad()
def report(width: int, height: int, dtype: torch.dtype, rows: list[int], rounds: int) -> None:
    """Time every way of decoding one picture and print a table."""
    ways = decoders(width, height, dtype, rows)
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    for decode in ways.values():
        decode()
    for _ in range(rounds):
        for name, decode in ways.items():
            found[name].append(timed(decode))
    ceilings = {name: rate(work, dtype) for name, work in (("convolution", convolution), ("matrix product", product))}
    operations = direct_operations(width, height)
    print(f"\n{width}x{height} {dtype}, {torch.get_num_threads()} threads, {rounds} rounds, {operations / 1e12:.2f} T")
    print("".join(f"one large {name}: {found / 1e9:.0f} G per processor second\n" for name, found in ceilings.items()))
    print("| decode | wall, s | ratio | processor, s | ratio | of the convolution's rate |")
    print("| --- | --- | --- | --- | --- | --- |")
    wall, processor = medians(found["diffusers"])
    for name, seconds in found.items():
        own = medians(seconds)
        numbers = (own[0], own[0] / wall, own[1], own[1] / processor, operations / own[1] / ceilings["convolution"])
        print(f"| {name} |" + "".join(f" {number:.2f} |" for number in numbers))


def decoders(width: int, height: int, dtype: torch.dtype, rows: list[int]) -> dict[str, Callable[[], object]]:
    """Every way of decoding, by name, on one latent and one set of random weights."""
    torch.manual_seed(0)
    ours = Autoencoder(SD3_VAE).eval()
    native = ours.state_dict()
    config = vae_config({name: tuple(t.shape) for name, t in native.items()})
    theirs: Any = AutoencoderKL.from_config(config)
    state = {name: revert(entry, native[entry.sources[0]]) for name, entry in to_diffusers(native, VAE).items()}
    theirs.load_state_dict(state)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    last = copy.deepcopy(ours).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    h, w = height // 8, width // 8
    latent = torch.randn(1, SD3_VAE.latent_channels, h, w).to(dtype)
    ways = {
        "diffusers": lambda: theirs.decode(latent, return_dict=False),
        "plain": lambda: ours.decode(latent),
        "plain, channels last": lambda: last.decode(latent),
    }
    for height_of_strip in dict.fromkeys([cpu_rows(h, w), *rows]):
        ways[f"strips of {height_of_strip}"] = lambda n=height_of_strip: decode_in_strips(last, latent, n)
    return ways


def direct_operations(width: int, height: int) -> float:
    """Multiplications and additions of the plain decode's convolutions and attention."""
    total, h, w = 0.0, height // 8, width // 8

    def count(module: nn.Module, _: object, result: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += 2 * module.weight[0].numel() * result.numel()

    with torch.device("meta"):
        vae = Autoencoder(SD3_VAE)
        for module in vae.modules():
            module.register_forward_hook(count)
        vae.decode(torch.empty(1, SD3_VAE.latent_channels, h, w))
    return total + 4 * (h * w) ** 2 * SD3_VAE.block_out_channels[-1]


def convolution(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A 3x3 convolution of 512 channels, channels last, and its operations."""
    x = torch.randn(1, 512, 64, 128).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3).to(dtype, memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1), 2.0 * weight[0].numel() * x.numel()


def product(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    a, b = torch.randn(4096, 4608).to(dtype), torch.randn(4608, 512).to(dtype)
    return lambda: a @ b, 2.0 * a.numel() * 512


def rate(work: Callable[[torch.dtype], tuple[Callable[[], object], float]], dtype: torch.dtype) -> float:
    """Operations per processor second, median of eleven runs."""
    run, operations = work(dtype)
    run()
    return operations / medians([timed(run) for _ in range(11)])[1]


def timed(work: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def medians(seconds: list[Seconds]) -> Seconds:
    wall, processor = zip(*seconds)
    return statistics.median(wall), statistics.median(processor)


if __name__ == "__main__":
    main()
