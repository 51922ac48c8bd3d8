"""What `--cache` saves and costs: `python -m benchmarks.caching [MODEL] [--prompts FILE]`.

For each threshold: the share of evaluations that were made, the distance of the latents at the end from those without a
cache (the norm of the difference over the norm), and the time, all in one run. On the demo model the judge says too how
many of the scenes are right.
"""

import argparse
import time
from pathlib import Path
from random import Random

import numpy as np
import torch

from benchmarks.emoji.judge import judge
from benchmarks.emoji.scenes import Scene, random_scene
from mmdit import Pipeline

THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


def drawn(pipe: Pipeline, prompt: str, seed: int, cache: float) -> tuple[torch.Tensor, int, float, np.ndarray]:
    """Latents at the end, evaluations by the network, seconds, and the picture."""
    calls, ends = [0], list[torch.Tensor]()
    hook = pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    start = time.perf_counter()
    try:
        image = pipe(prompt, seed=seed, cache=cache, on_step=lambda event: ends.append(event.latents))[0]
    finally:
        hook.remove()
    return ends[-1], calls[0], time.perf_counter() - start, np.array(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None, help="as --model takes it (default: the demo model)")
    parser.add_argument("--prompts", type=Path, default=None, help="a prompt a line (default: scenes of the demo)")
    parser.add_argument("--count", type=int, default=20, help="scenes of the demo")
    args = parser.parse_args()

    random, scenes = Random(60_000_000), list[Scene]()
    if args.prompts is None:
        scenes = [random_scene(random, count=1 + i % 3) for i in range(args.count)]
        texts = [scene.caption for scene in scenes]
    else:
        texts = args.prompts.read_text().splitlines()
    pipe = Pipeline.load(args.model)
    drawn(pipe, texts[0], 0, 0.0)  # what only the first one costs
    found = {cache: [drawn(pipe, text, i, cache) for i, text in enumerate(texts)] for cache in THRESHOLDS}
    print("| --cache | evaluations | time | distance | right |\n| --- | --- | --- | --- | --- |")
    plain = found[0.0]
    for cache, pictures in found.items():
        calls = sum(one[1] for one in pictures) / sum(one[1] for one in plain)
        seconds = sum(one[2] for one in pictures) / sum(one[2] for one in plain)
        away = np.mean([float((a[0] - b[0]).norm() / b[0].norm()) for a, b in zip(pictures, plain)])
        right = [judge(one[3], len(scene.nouns)).nouns == scene.nouns for one, scene in zip(pictures, scenes)]
        told = f"{sum(right)} of {len(right)}" if right else ""
        print(f"| {cache:g} | {calls:.2f} | {seconds:.2f} | {away:.3f} | {told} |")


if __name__ == "__main__":
    main()
