"""A picture of what steers the demo model: `python -m benchmarks.emoji.steering OUT.png [--control NET]`.

A row each: image to image, inpainting, outpainting, guidance, solvers with few steps, and with NET, a ControlNet made
by `benchmarks.emoji.train_control`, control by edges.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.emoji.scenes import random_scene, render
from benchmarks.emoji.train_control import edges
from mmdit import Pipeline

Labelled = tuple[str, Image.Image]
SEED, SIDE, GAP, LINE, LETTER = 3, 128, 6, 14, 6  # pixels


def one(pipe: Pipeline, prompt: str, **keywords: Any) -> Image.Image:
    return pipe(prompt, **{"seed": SEED, **keywords})[0]


def from_a_picture(pipe: Pipeline) -> list[Labelled]:
    init = one(pipe, "a fox on a green background")
    wanted = "a tiger on a green background"
    found = [(f"strength {x}", one(pipe, wanted, init=init, strength=x)) for x in (0.1, 0.15, 0.2, 0.3, 0.6)]
    return [("--init", init), *found]


def inside(pipe: Pipeline) -> list[Labelled]:
    init = one(pipe, "a horse and a bear on a yellow background")
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    others = ("fox", "panda", "robot", "snail")
    found = [
        (f"a horse and a {name}", one(pipe, f"a horse and a {name} on a yellow background", init=init, mask=mask))
        for name in others
    ]
    return [("--init", init), ("--mask", mask.convert("RGB")), *found]


def beyond(pipe: Pipeline) -> list[Labelled]:
    init = one(pipe, "a bear on a blue background")
    right = one(pipe, "a bear and a fox on a blue background", init=init, outpaint="0,0,64,0")
    left = one(pipe, "a fox and a bear on a blue background", init=init, outpaint="64,0,0,0")
    return [("--init", init), ("--outpaint 0,0,64,0", right), ("--outpaint 64,0,0,0", left)]


def guided(pipe: Pipeline) -> list[Labelled]:
    prompt = "a blue horse, a bear and a fox on a white background"
    ways: list[dict[str, Any]] = [
        {"cfg": 1}, {"cfg": 3}, {"cfg": 9}, {"cfg": 9, "cfg_rescale": 0.8}, {"cfg": 9, "apg": "0:5:-0.5"},
        {"cfg": 9, "cfg_zero": True}, {"cfg": 3, "slg": 2.5, "slg_interval": "0.01:0.5"}, {"cfg": 1, "pag": 2.0},
    ]  # fmt: skip
    told = [", ".join(f"{k} {v}" for k, v in way.items() if k != "slg_interval") for way in ways]
    return [(words, one(pipe, prompt, **way)) for words, way in zip(told, ways)]


def solved(pipe: Pipeline) -> list[Labelled]:
    prompt = "a panda and a frog on a pink background"
    names = ("euler", "heun", "dpmpp_2m", "res_multistep", "unipc", "deis", "euler_ancestral", "dpmpp_2m_sde")
    found = []
    for name in names:
        steps = 6 if name == "heun" else 12  # twelve evaluations
        schedule = "sgm_uniform"  # the last of the usual levels lies too low for solvers of higher order
        found.append((f"{name}, {steps} steps", one(pipe, prompt, sampler=name, steps=steps, schedule=schedule)))
    return found


def controlled(net: Path) -> list[Labelled]:
    pipe = Pipeline.load(control=[str(net)])
    scene = random_scene(Random(SEED), count=2)
    plan = edges(render(scene, SIDE))
    wanted = (scene.caption, "a cat and a pear", "a bear and a fox")
    found = [("--control-image", Image.fromarray(plan))]
    for prompt in wanted:
        for scale in (0.0, 1.0):
            image = one(pipe, prompt, control_image=[Image.fromarray(plan)], control_scale=[scale])
            found.append((f"{scale:g}: {prompt}", image))
    return found


def table(rows: list[list[Labelled]]) -> Image.Image:
    """The pictures in rows, each under its label."""
    width = max(sum(image.width + GAP for _, image in row) for row in rows) + GAP
    heights = [max(image.height for _, image in row) + LINE + GAP for row in rows]
    whole = Image.new("RGB", (width, sum(heights) + GAP), "lightgray")
    draw, y = ImageDraw.Draw(whole), GAP
    for row, height in zip(rows, heights):
        x = GAP
        for label, image in row:
            draw.text((x, y), label[: image.width // LETTER], fill="black")
            whole.paste(image, (x, y + LINE))
            x += image.width + GAP
        y += height
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--control", type=Path, default=None, metavar="NET", help="folder of a ControlNet")
    args = parser.parse_args()
    pipe = Pipeline.load()
    rows = [from_a_picture(pipe), inside(pipe), beyond(pipe), guided(pipe), solved(pipe)]
    if args.control is not None:
        rows.append(controlled(args.control))
    table(rows).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
