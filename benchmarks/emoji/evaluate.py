"""How often the demo model draws what the caption says: `python -m benchmarks.emoji.evaluate`.

Draws scenes with the model's own settings and seeds that no training used, and has `judge` say what is there and what
went wrong. Prints rates with 95 % intervals and, as its last line, the same as JSON.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.emoji.judge import FAILURES, Verdict, failure, interval, judge
from benchmarks.emoji.scenes import Scene, random_scene, render
from benchmarks.emoji.train_vae import reconstruction_db
from mmdit import Pipeline, Settings
from samplers import euler, shifted_sigmas

BATCH = 25


def nouns(scene: Scene, verdict: Verdict) -> bool:
    return verdict.nouns == scene.nouns


def all_right(scene: Scene, verdict: Verdict) -> bool:
    return nouns(scene, verdict) and verdict.tints == scene.tints


@dataclass(frozen=True)
class Kind:
    """Scenes of one kind, and what is asked of their pictures."""

    target: float | None
    scene: dict[str, Any]  # keywords of `random_scene`
    right: Callable[[Scene, Verdict], bool] = nouns
    settings: dict[str, int] | None = None
    t5: str = "on"
    share: float = 1.0  # of the number of scenes asked for


KINDS = {
    "one subject": Kind(0.97, {"count": 1}),
    "two, each in its place": Kind(0.90, {"count": 2}),
    "two never seen together": Kind(0.85, {"count": 2, "unseen_pair": True}),
    "three": Kind(0.70, {"count": 3}),
    "four": Kind(0.50, {"count": 4}),
    "colour of one": Kind(0.85, {"count": 1, "tinted": 1.0}, all_right),
    "colour never seen on it": Kind(0.70, {"count": 1, "tinted": 1.0, "unseen_tint": True}, all_right),
    "colours of two": Kind(None, {"count": 2, "tinted": 1.0}, all_right),
    "two at 64x64": Kind(None, {"count": 2}, settings={"width": 64, "height": 64}, share=0.25),
    "three at 192x128": Kind(None, {"count": 3}, settings={"width": 192, "height": 128}, share=0.25),
    "four at 192x192": Kind(None, {"count": 4}, settings={"width": 192, "height": 192}, share=0.25),
    "one subject, T5 off": Kind(0.90, {"count": 1}, t5="off"),
}
GROUND = "background"
GROUND_TARGET, RECONSTRUCTION_TARGET = 0.99, 30.0


@torch.no_grad()
def draw(pipe: Pipeline, captions: list[str], settings: Settings) -> np.ndarray:
    """One picture per caption, picture i from seed + i, with the pipeline's own stages; uint8 `(B, H, W, 3)`."""
    s = pipe.check(replace(settings, count=len(captions)))
    assert s.width and s.height and s.steps and s.t5_length and s.cfg is not None
    cond, uncond = pipe.encode(captions, s.t5_length), pipe.encode([s.negative], s.t5_length)
    noise = pipe.noise(s.width, s.height, range(s.seed, s.seed + s.count))
    velocity = pipe.velocity(cond, uncond, s.cfg, s.count)
    return pipe.decode(euler(velocity, noise, shifted_sigmas(s.steps, pipe.shift))).numpy()


def measure(pipe: Pipeline, kind: Kind, count: int, seed: int, **settings: float) -> tuple[dict, np.ndarray]:
    """Draw `count` scenes of a kind; how many are right, what the others are, and the pictures."""
    rng, pictures = Random(seed), []
    scenes = [random_scene(rng, **kind.scene) for _ in range(count)]
    own = replace(pipe.settings, **{**settings, **(kind.settings or {})})
    for i in range(0, count, BATCH):
        captions = [scene.caption for scene in scenes[i : i + BATCH]]
        pictures.append(draw(pipe, captions, replace(own, seed=seed + i)))
    pictures = np.concatenate(pictures)
    verdicts = [judge(picture, len(scene.nouns)) for picture, scene in zip(pictures, scenes)]
    judged = list(zip(scenes, verdicts, pictures))
    named = [verdict.colour == scene.colour for scene, verdict, _ in judged if scene.named_colour]
    wrong = [(s, v, failure(s, v, p) or "") for s, v, p in judged if not kind.right(s, v)]
    found = {
        "right": count - len(wrong),
        "count": count,
        "ground": sum(named),
        "named": len(named),
        "failures": Counter(why for _, _, why in wrong),
        "wrong": [
            (s.caption, [(seen.noun, seen.tint, round(seen.mismatch, 2)) for seen in v.places]) for s, v, _ in wrong
        ],
    }
    return found, pictures


def judge_itself(count: int, seed: int, vae: Any = None) -> float:
    """How often the judge is right about rendered scenes, or their reconstructions: what it costs the rates below."""
    rng = Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = np.stack([render(scene) for scene in scenes])
    if vae is not None:
        image = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0
        with torch.no_grad():
            decoded = torch.cat([vae.decode(vae.encode(part)[0]) for part in image.split(BATCH)])
        pictures = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = [judge(picture, len(scene.nouns)) for picture, scene in zip(pictures, scenes)]
    return sum(all_right(s, v) and v.colour == s.colour for s, v in zip(scenes, verdicts)) / count


def sheet(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """Save the first pictures as one."""
    columns = min(columns, len(pictures))
    rows = min(len(pictures) // columns, 6)
    n, (h, w) = rows * columns, pictures.shape[1:3]
    grid = pictures[:n].reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 3)
    Image.fromarray(grid).save(path)


def report(results: dict[str, dict]) -> dict[str, Any]:
    """Print the table; the same as a dict."""
    print(f"{'':24} {'rate':>7}  {'95 % interval':>15}  {'n':>5}  target  what the others are")
    out: dict[str, Any] = {}
    for name, found in results.items():
        right, count, target = found["right"], found["count"], found["target"]
        low, high = interval(right, count)
        others = ", ".join(f"{found['failures'][why]} {why}" for why in FAILURES if found["failures"][why])
        goal = "" if target is None else f"{target:.0%}"
        print(f"{name:24} {right / count:7.1%}  {low:6.1%} to {high:6.1%}  {count:5}  {goal:>6}  {others}")
        rates = {"rate": right / count, "low": low, "high": high, "n": count, "target": target}
        out[name] = {**rates, "failures": dict(found["failures"])}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="folder (default: the demo model)")
    parser.add_argument("--count", type=int, default=400, help="scenes of each kind")
    parser.add_argument("--kinds", default="", help="only those whose names contain this")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=70_000_000)
    parser.add_argument("--cfg", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--shift", type=float, default=None)
    parser.add_argument("--sheets", type=Path, default=None, help="folder for sheets of the pictures")
    args = parser.parse_args()
    settings = {name: value for name in ("cfg", "steps") if (value := getattr(args, name)) is not None}

    results: dict[str, dict] = {}
    ground, named, start = 0, 0, time.perf_counter()
    for t5 in ("on", "off"):
        pipe = Pipeline.load(args.model, t5=t5, device=args.device)
        pipe.shift = args.shift or pipe.shift
        for number, (name, kind) in enumerate(KINDS.items()):
            if kind.t5 != t5 or args.kinds not in name:
                continue
            count = max(1, round(kind.share * args.count))
            found, pictures = measure(pipe, kind, count, args.seed + number * 100_000, **settings)
            results[name] = {**found, "target": kind.target}
            if t5 == "on" and kind.settings is None:
                ground, named = ground + found["ground"], named + found["named"]
            if args.sheets:
                args.sheets.mkdir(parents=True, exist_ok=True)
                sheet(pictures, args.sheets / f"{name.replace(', ', '-').replace(' ', '-')}.png")
                print(f"{name}: {found['wrong'][:6]}", flush=True)
    if named:
        results[GROUND] = {"right": ground, "count": named, "failures": Counter(), "target": GROUND_TARGET}

    rng = Random(args.seed)
    pixels = np.stack([render(random_scene(rng)) for _ in range(200)])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0
    vae = Pipeline.load(args.model, t5="off", dtype="fp32", device="cpu").vae
    quality = reconstruction_db(vae, image)
    rendered, reconstructed = judge_itself(400, args.seed), judge_itself(100, args.seed, vae)
    print(f"reconstruction of 200 scenes: {quality:.2f} dB (target {RECONSTRUCTION_TARGET:.0f})")
    print(f"the judge is right about {rendered:.1%} of 400 rendered scenes, {reconstructed:.1%} of 100 reconstructions")
    out = {"reconstruction_db": round(quality, 2), "judge": rendered, "judge_reconstructed": reconstructed}
    print(json.dumps({**out, **report(results), "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
