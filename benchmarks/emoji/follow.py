"""How closely the demo model follows edges with a ControlNet: `python -m benchmarks.emoji.follow NET [--scenes N]`.

Scenes that no training used are rendered, and drawn again from their captions with and without the edges of the
rendering. How well a drawing follows is told by the edges in it: the mean of the shares of each that lie within two
pixels of the other (their F1). The judge says how often all subjects are right. Without the net, the figure tells how
alike two drawings of one caption are anyway. With the edges of another scene it tells whether edges or words win.
"""

import argparse
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.emoji.judge import interval, judge
from benchmarks.emoji.scenes import Scene, random_scene, render
from benchmarks.emoji.train_control import edges
from mmdit import Pipeline

NEAR, BATCH = 2, 20  # pixels, pictures


def near(found: np.ndarray) -> np.ndarray:
    """Where edges `(H, W)` are at most `NEAR` pixels away."""
    return np.asarray(Image.fromarray(found).filter(ImageFilter.MaxFilter(2 * NEAR + 1))) > 0


def followed(drawing: np.ndarray, plan: np.ndarray) -> float:
    """The F1 of the edges of a drawing, uint8 `(H, W, 3)`, and those of a plan, white on black."""
    ours, theirs = edges(drawing)[..., 0], plan[..., 0]
    if not ours.any() or not theirs.any():
        return 0.0
    precision, recall = (near(theirs)[ours > 0]).mean(), (near(ours)[theirs > 0]).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def drawn(pipe: Pipeline, scenes: list[Scene], plans: list[np.ndarray], scale: float, steps: int) -> list[np.ndarray]:
    """Each scene's caption drawn with a plan, seeds by their number."""
    asked = [
        {"prompt": scene.caption, "seed": i, "control_image": [Image.fromarray(plan)], "control_scale": [scale]}
        for i, (scene, plan) in enumerate(zip(scenes, plans))
    ]
    found = {s.seed: np.array(image) for s, image in pipe.draw_many(asked, steps=steps)}
    return [found[i] for i in range(len(scenes))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, metavar="NET", help="folder of the ControlNet")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=90_000_000)
    args = parser.parse_args()

    random, side = Random(args.seed), 128
    scenes = [random_scene(random, count=random.choice((1, 2))) for _ in range(args.scenes)]
    plans = [edges(render(scene, side)) for scene in scenes]
    pipe = Pipeline.load(control=[str(args.net)])
    ways = {"no net": (0.0, plans), "its own edges": (1.0, plans), "another's edges": (1.0, plans[1:] + plans[:1])}
    print("| | follows the edges given | all subjects right | 95 % interval |\n| --- | --- | --- | --- |")
    for name, (scale, given) in ways.items():
        pictures = drawn(pipe, scenes, given, scale, args.steps)
        score = np.mean([followed(picture, plan) for picture, plan in zip(pictures, given)])
        right = sum(judge(picture, len(s.subjects)).nouns == s.nouns for picture, s in zip(pictures, scenes))
        low, high = interval(right, len(scenes))
        print(f"| {name} | {score:.2f} | {right / len(scenes):.0%} | {low:.0%} to {high:.0%} |", flush=True)


if __name__ == "__main__":
    main()
