"""How often the demo model draws what the caption says: `python -m benchmarks.emoji.evaluate`.

Draws scenes with the model's own settings and seeds that no training used, and has `judge` say what is there. Prints
rates with 95 % intervals, and as its last line the same as JSON.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.emoji.judge import interval, judge
from benchmarks.emoji.scenes import Scene, random_scene, render
from benchmarks.emoji.train_vae import reconstruction_db
from mmdit import Pipeline, Settings
from samplers import euler, shifted_sigmas

TARGETS = {"single": 0.95, "background": 0.98, "pair, seen": 0.80, "pair, unseen": 0.60, "single, t5 off": 0.90}
BATCH = 50


@torch.no_grad()
def draw(pipe: Pipeline, captions: list[str], settings: Settings) -> np.ndarray:
    """One picture per caption, picture i from seed + i, with the pipeline's own stages; uint8 `(B, S, S, 3)`."""
    s = pipe.check(replace(settings, count=len(captions)))
    assert s.width and s.height and s.steps and s.t5_length and s.cfg is not None
    cond, uncond = pipe.encode(captions, s.t5_length), pipe.encode([s.negative], s.t5_length)
    noise = pipe.noise(s.width, s.height, range(s.seed, s.seed + s.count))
    velocity = pipe.velocity(cond, uncond, s.cfg, s.count)
    return pipe.decode(euler(velocity, noise, shifted_sigmas(s.steps, pipe.shift))).numpy()


def scenes_of(kind: str, count: int, seed: int) -> list[Scene]:
    rng = Random(seed)
    subjects = 2 if kind.startswith("pair") else 1
    return [random_scene(rng, subjects, unseen=kind == "pair, unseen") for _ in range(count)]


def measure(pipe: Pipeline, kind: str, count: int, seed: int, **settings: float) -> tuple[dict, np.ndarray]:
    """Draw `count` scenes of a kind; the counts of right subjects and grounds, and the pictures."""
    scenes, pictures = scenes_of(kind, count, seed), []
    own = replace(pipe.settings, **settings)
    for i in range(0, count, BATCH):
        captions = [scene.caption for scene in scenes[i : i + BATCH]]
        pictures.append(draw(pipe, captions, replace(own, seed=seed + i)))
    pictures = np.concatenate(pictures)
    verdicts = [judge(picture, len(scene.nouns)) for picture, scene in zip(pictures, scenes)]
    named = [(v, s) for v, s in zip(verdicts, scenes) if s.named_colour]
    found = {
        "count": count,
        "right": sum(v.nouns == s.nouns for v, s in zip(verdicts, scenes)),
        "named": len(named),
        "ground": sum(v.colour == s.colour for v, s in named),
        "wrong": [(s.caption, v.nouns) for v, s in zip(verdicts, scenes) if v.nouns != s.nouns],
    }
    return found, pictures


def judge_itself(count: int, seed: int) -> float:
    """How often the judge is right about rendered scenes: what it costs the rates below."""
    rng = Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    verdicts = [judge(render(scene), len(scene.nouns)) for scene in scenes]
    return sum((v.nouns, v.colour) == (s.nouns, s.colour) for v, s in zip(verdicts, scenes)) / count


def sheet(pictures: np.ndarray, path: Path, columns: int = 12) -> None:
    """Save the first pictures as one."""
    rows = min(len(pictures) // columns, 8)
    n, s = rows * columns, pictures.shape[1]
    grid = pictures[:n].reshape(rows, columns, s, s, 3).transpose(0, 2, 1, 3, 4).reshape(rows * s, columns * s, 3)
    Image.fromarray(grid).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="folder (default: the demo model)")
    parser.add_argument("--count", type=int, default=400, help="scenes of each kind")
    parser.add_argument("--seed", type=int, default=70_000_000)
    parser.add_argument("--cfg", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--shift", type=float, default=None)
    parser.add_argument("--sheets", type=Path, default=None, help="folder for sheets of the pictures")
    args = parser.parse_args()
    settings = {name: value for name in ("cfg", "steps") if (value := getattr(args, name)) is not None}

    results, ground, named, start = {}, 0, 0, time.perf_counter()
    for t5 in ("on", "off"):
        pipe = Pipeline.load(args.model, t5=t5)
        pipe.shift = args.shift or pipe.shift
        for kind in [k for k in TARGETS if k != "background" and ("t5 off" in k) == (t5 == "off")]:
            found, pictures = measure(pipe, kind, args.count, args.seed + len(results) * 100_000, **settings)
            results[kind] = (found["right"], found["count"])
            if t5 == "on":
                ground, named = ground + found["ground"], named + found["named"]
            if args.sheets:
                args.sheets.mkdir(parents=True, exist_ok=True)
                sheet(pictures, args.sheets / f"{kind.replace(', ', '-').replace(' ', '-')}.png")
                print(f"{kind}: {found['wrong'][:6]}")
    results["background"] = (ground, named)

    rng = Random(args.seed)
    pixels = np.stack([render(random_scene(rng)) for _ in range(200)])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0
    quality = reconstruction_db(Pipeline.load(args.model, t5="off", dtype="fp32").vae, image)

    report: dict[str, Any] = {"reconstruction_db": round(quality, 2), "judge": judge_itself(1000, args.seed)}
    print(f"reconstruction of 200 scenes: {quality:.2f} dB (target 28)")
    print(f"the judge is right about {100 * report['judge']:.1f} % of 1000 rendered scenes")
    print(f"{'':16} {'rate':>7}  {'95 % interval':>15}  {'n':>5}  target")
    for kind, target in TARGETS.items():
        right, count = results[kind]
        low, high = interval(right, count)
        print(f"{kind:16} {right / count:7.1%}  {low:6.1%} to {high:6.1%}  {count:5}  {target:.0%}")
        report[kind] = {"rate": right / count, "low": low, "high": high, "n": count, "target": target}
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
