"""What processes that draw one picture together send: counted, beside the arithmetic; and how long it takes on GPUs.

    python -m benchmarks.parallel                                    counts, on CPUs
    torchrun --nproc-per-node 4 -m benchmarks.parallel FOLDER        seconds, on GPUs

Counts: SD3.5-Medium's transformer without values, by 2, 3, 4 and 8 processes that are played one after another: each
collective is wrapped, and what it would send to others is added up. Beside it stands `mmdit.parallel.costs.sent`, by
which the command chooses.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.config import SD35_MEDIUM, MMDiTConfig
from mmdit.model import MMDiT
from mmdit.parallel.costs import Link, Question, chosen, seconds, sent
from mmdit.parallel.ranks import Layout, Line
from mmdit.parallel.tokens import exchanges_of, split

SIZES = (1024, 1440)
TEXT = 333  # tokens: 77 of CLIP, 256 of T5
GPU = 790e12  # operations a second of an H100 in bfloat16, as it was measured elsewhere
LINKS = {"NVLink, 300 GB/s": 300e9, "PCIe 4, 25 GB/s": 25e9}
WAIT = 30e-6  # seconds of an exchange


@contextmanager
def counted(place: int) -> Iterator[list[int]]:
    """Meanwhile collectives send nothing; the bytes that each would have sent to other processes."""
    found: list[int] = []

    def count(_: Tensor, flat: Tensor, __: Sequence[int], into: Sequence[int], group: Any) -> None:  # noqa: ARG001
        found.append((sum(into) - into[place]) * flat.itemsize)

    own, dist.all_to_all_single = dist.all_to_all_single, count
    try:
        yield found
    finally:
        dist.all_to_all_single = own


def bytes_of(config: MMDiTConfig, side: int, size: int, rows: int = 1, text: int = TEXT) -> list[list[int]]:
    """Bytes of every exchange, for each of so many processes that share the tokens of so many rows; in bfloat16."""
    with torch.device("meta"):
        model = MMDiT(config).bfloat16()
        latent = torch.empty(rows, config.in_channels, side // 8, side // 8, dtype=torch.bfloat16)
        context = torch.empty(rows, text, config.context_size, dtype=torch.bfloat16)
        pooled, sigma = torch.empty(rows, config.pooled_size, dtype=torch.bfloat16), torch.empty(rows)
    found = []
    for place in range(size):
        line = Line(size, place, None)
        with torch.no_grad(), counted(place) as told, split(model, exchanges_of(model, line, latent, text)):
            assert model(latent, sigma, context, pooled).shape == latent.shape
        found.append(told)
    return found


def table(say: Callable[[str], object] = print) -> None:
    say("Bytes that a process sends in an evaluation of one text, tokens shared (Ulysses), SD3.5-Medium, bfloat16")
    say("| picture | processes | counted, the most of one | by arithmetic | exchanges |")
    say("| --- | --- | --- | --- | --- |")
    for side, size in product(SIZES, (2, 3, 4, 8)):
        every = bytes_of(SD35_MEDIUM, side, size)
        expected, times = sent(SD35_MEDIUM, Question(1, (side // 16) ** 2, TEXT), Layout(tokens=size))
        assert all(len(told) == times for told in every)
        say(f"| {side}² | {size} | {max(map(sum, every)) / 1e9:.4f} GB | {expected / 1e9:.4f} GB | {times} |")
    say("")
    say(f"What is chosen for a guided step, by arithmetic: {GPU / 1e12:.0f} TFLOP/s, {WAIT * 1e6:.0f} us an exchange")
    say("| picture | processes | link | texts x tokens | times one process |")
    say("| --- | --- | --- | --- | --- |")
    for side, size, (name, speed) in product((512, *SIZES), (2, 4, 8), LINKS.items()):
        asked, link = Question(2, (side // 16) ** 2, TEXT), Link(GPU, speed, WAIT)
        layout = chosen("auto", SD35_MEDIUM, asked, size, link)
        one, this = (seconds(SD35_MEDIUM, asked, way, link) for way in (Layout(), layout))
        say(f"| {side}² | {size} | {name} | {layout.rows} x {layout.tokens} | {one / this:.2f} |")


def measured(model: str | None, sides: Sequence[int], steps: int) -> None:
    """Seconds of a guided step by one process, and by all of them in every way that they can share it."""
    from mmdit.common.errors import SettingsError
    from mmdit.driver.pipeline import Pipeline
    from mmdit.parallel.command import joined
    from mmdit.parallel.started import see_one_gpu, started
    from mmdit.parallel.together import together

    place = started()
    assert place is not None
    see_one_gpu(place)
    with joined(place) as ranks:
        pipe = ranks.together(lambda: Pipeline.load(model))
        say = print if ranks.first else lambda *_: None
        for side in sides:
            more: dict[str, Any] = {"width": side, "height": side, "steps": steps}
            times = {"one": denoised(pipe, more)}
            for way in ("guidance", "tokens", "both", "auto"):
                try:
                    with together(pipe, ranks, way, say):
                        times[way] = denoised(pipe, more)
                except SettingsError as error:
                    say(f"{way}: {error}")
            for way, took in times.items():
                say(f"{side}²: {way}: {took / steps:.4f} s a step, {times['one'] / took:.2f} times one")


def denoised(pipe: Any, more: dict[str, Any]) -> float:
    """Seconds of the loop alone, the second time."""
    for _ in range(2):
        settings = pipe.asked({"prompt": "a horse", **more})
        found = pipe.run(settings).seconds["denoise"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="for seconds; the demo where none is given")
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES])
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args(arguments)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        table()
    else:
        measured(None if given.model is None else str(given.model), given.sizes, given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
