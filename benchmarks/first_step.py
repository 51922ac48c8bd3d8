"""A process that ends at its first step, for `benchmarks.speed`: who, folder, size, dtype, device.

It imports nothing but what the one that is timed imports.
"""

import os
import sys
from pathlib import Path
from typing import Any


def main(who: str, folder: Path, size: int, dtype: str, device: str) -> None:
    """Draw until the transformer is called for the first time, say so, and end the process."""

    def reached(*_: object) -> None:
        print("first step", flush=True)
        os._exit(0)

    if who == "ours":
        from mmdit import run

        run.begin()

        run.show_plan = lambda pipeline, _: pipeline.transformer.x_embedder.register_forward_pre_hook(reached)
        sides = ("--width", str(size), "--height", str(size))
        run.main(["a horse", "--model", str(folder), "--t5", "off", "--dtype", dtype, "--device", device, *sides])
    else:
        from benchmarks.speed_peers import diffusers

        pipe: Any = diffusers(folder, dtype, device)
        pipe.transformer.register_forward_pre_hook(reached)
        pipe("a horse", width=size, height=size)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
