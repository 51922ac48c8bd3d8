"""One picture, stage by stage, in a process of its own: `python drawn_alone.py FOLDER` prints what each stage took.

JSON: for each stage the most bytes of anonymous memory that the process had, and what the plan said.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from mmdit import Pipeline
from mmdit.memory.host import own_bytes


def watched(work: Callable[[], Any]) -> tuple[Any, int]:
    """What it gives, and the most bytes that this process has had meanwhile."""
    done, found = Event(), [0]

    def look() -> None:
        while not done.is_set():
            found[0] = max(found[0], own_bytes())
            done.wait(0.001)

    watcher = Thread(target=look)
    watcher.start()
    try:
        return work(), found[0]
    finally:
        done.set()
        watcher.join()


@torch.no_grad()
def main(folder: str) -> None:
    pipe = Pipeline.load(folder, device="cpu", dtype="fp32", memory="8GB")
    asked = {
        "prompt": "a horse",
        "width": 512,
        "height": 512,
        "steps": 1,
        "count": 4,
        "t5_length": 77,
        "attention": "math",
    }
    settings = pipe.check(replace(pipe.settings, **asked))
    job = pipe.job(settings)._replace(init=True)
    pipe.follow(pipe.plan_for(job), job)
    took = {}
    texts, took["encode"] = watched(lambda: pipe.encode(["a horse", ""], 77))
    pixels = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
    _, took["init"] = watched(lambda: pipe.encode_picture(pixels))
    noise = pipe.noise(512, 512, range(4))

    def step() -> torch.Tensor:
        return pipe.velocity(texts[:1], texts[1:], cfg=4.5, count=4, sigmas=[1.0], attention="math")(
            noise, torch.tensor(1.0)
        )

    latents, took["denoise"] = watched(step)
    _, took["decode"] = watched(lambda: pipe.decode(latents[:1]))
    print(json.dumps({name: (took[name], pipe.plan.stages[name]) for name in took}))


if __name__ == "__main__":
    main(sys.argv[1])
