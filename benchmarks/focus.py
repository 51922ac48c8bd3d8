"""Does keeping subjects apart help? `python -m benchmarks.focus [--model FOLDER] [--adapter FILE] [--out FOLDER]`.

Of the demo model the truth is known: what it draws of prompts of two, three and four subjects is judged, by plain
sampling, by FOCUS with each loss, and by other ways to spend the same time. Every way has the same prompts and seeds;
differences to plain sampling are paired, with 95 % intervals by a bootstrap over prompts. Scales, gains and windows are
chosen first, on 60 other prompts, by how like the pictures are to what was asked for. The prompts are of four groups
(`benchmarks.emoji.several`), at some of which the demo is bad.

Every picture is a line of OUT/WAY.jsonl, so a run that was cut off goes on. OUT/table.md, OUT/focus.png: plain above
FOCUS, the first prompts where just one of them is right. `--only TEXT` draws just the ways whose names have it, so
that two processes may share the work, of different texts; the tables want all.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.emoji.compare import interval, shown
from benchmarks.emoji.several import RATES, Prompt, judged, prompts_of
from mmdit import Pipeline
from mmdit.driver.watch import Stepped
from samplers.focus import COSTS

STEPS, SEED, CHOOSING, AGAIN, CHUNK = 14, 60_000_000, 1_000_000, 2_000_000, 24
COUNTS = {"usual": 108, "loose": 108, "twins": 36, "single": 36}  # prompts
COUNTS_CHOOSING = {"usual": 12, "loose": 36, "twins": 12}
SHOWN, HEAD = 8, 54  # pictures of the figure, pixels over them

Keywords = dict[str, Any]
Line = dict[str, Any]  # what was found of a picture


class Way(NamedTuple):
    """A way to draw; pushed: by FOCUS. again: with another seed."""

    name: str
    keywords: Keywords
    pushed: bool = False
    again: int = 0


# ---- drawing and judging ---------------------------------------------------------------------------


def draw(pipe: Pipeline, prompts: Sequence[Prompt], way: Way) -> list[tuple[np.ndarray, float]]:
    """Each prompt's picture, and the mean over its steps of FOCUS's cost, of pictures that are not pushed too."""
    costs: dict[int, list[float]] = {}

    def on_step(event: Stepped) -> None:
        if event.attention is not None:
            groups, maps = tuple(event.attention.subjects.values()), event.attention.attended.maps
            costs.setdefault(event.settings.seed, []).append(float(COSTS["focus"](groups)(maps)))

    asked = [
        {"prompt": p.text, "seed": p.seed + way.again * AGAIN, "attention_maps": p.subjects,
         **({"focus": p.subjects} if way.pushed else {})} for p in prompts
    ]  # fmt: skip
    drawn = pipe.draw_many(asked, on_step=on_step, **{"steps": STEPS, **way.keywords})
    found = {s.seed - way.again * AGAIN: np.array(image) for s, image in drawn}
    return [(found[p.seed], float(np.mean(costs[p.seed + way.again * AGAIN]))) for p in prompts]


def lines_of(path: Path) -> list[Line]:
    """What is there; a line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drawn(pipe: Pipeline, prompts: Sequence[Prompt], way: Way, out: Path) -> list[Line]:
    """A line for each prompt, those that are not there yet drawn now."""
    path = out / f"{way.name}.jsonl"
    there = lines_of(path)
    assert len(there) <= len(prompts), f"{path}: {len(there)} lines for {len(prompts)} prompts"
    path.write_text("".join(json.dumps(line) + "\n" for line in there))
    for first in range(len(there), len(prompts), CHUNK):
        some, start = prompts[first : first + CHUNK], time.process_time()
        pictures = draw(pipe, some, way)
        seconds = (time.process_time() - start) / len(some)
        for prompt, (picture, cost) in zip(some, pictures):
            there.append({**judged(picture, prompt.scene), "cost": cost, "seconds": seconds})
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in there[first:])
    likeness, right = (np.mean([line[name] for line in there]) for name in ("likeness", "all right"))
    print(f"{way.name}: likeness {likeness:.3f}, all right {right:.1%}", flush=True)
    return there


# ---- ways ------------------------------------------------------------------------------------------

SCALES = {"code": (1, 4, 16, 64), "unit": (300, 1000), "step": (30, 100, 300, 1000), "relative": (0.1, 0.3, 1, 3, 10)}
EARLY, LONG = 0.9, 0.6  # noise levels until which it is pushed
OTHERS = (
    0.3,
    1,
    3,
    10,
)  # scales of the other losses, whose gradients are of other lengths: by the gain that heeds none


def focused(loss: str, gain: str, scale: float, until: float) -> Way:
    keywords = {"focus_loss": loss, "focus_gain": gain, "focus_scale": float(scale), "focus_until": until}
    return Way(f"{loss} {gain} {scale:g} until {until:g}", keywords, pushed=True)


def candidates() -> list[Way]:
    early = [focused("focus", gain, scale, EARLY) for gain, scales in SCALES.items() for scale in scales]
    long = [focused("focus", gain, scale, LONG) for gain in ("unit", "relative") for scale in SCALES[gain][:4]]
    return early + long + [focused(x, "relative", scale, EARLY) for x in COSTS if x != "focus" for scale in OTHERS]


def best_of(some: Sequence[Sequence[Line]], by: Callable[[Line], Any]) -> list[Line]:
    """Of several pictures of each prompt that which has most; its time is that of all."""
    return [{**max(lines, key=by), "seconds": sum(line["seconds"] for line in lines)} for lines in zip(*some)]


def main_ways(chosen: dict[str, Keywords]) -> list[Way]:
    best = [focused(*(k[f"focus_{x}"] for x in ("loss", "gain", "scale", "until"))) for k in chosen.values()]
    own = chosen["focus"]
    around = [
        focused("focus", own["focus_gain"], min(own["focus_scale"] * x, 1000), own["focus_until"]) for x in (0.3, 3)
    ]
    ways = [
        Way("plain", {}), best[0], focused("focus", own["focus_gain"], own["focus_scale"], EARLY),
        focused("focus", "code", 1, EARLY), *best[1:], Way("plain again", {}, again=1),
        Way("28 steps", {"steps": 2 * STEPS}), Way("guidance 4.5", {"cfg": 4.5}), Way("guidance 6", {"cfg": 6.0}),
        *around,
        Way("plain once more", {}, again=2), Way("28 steps, guidance 6", {"steps": 2 * STEPS, "cfg": 6.0}),
    ]  # fmt: skip
    return list({way.name: way for way in ways}.values())


# ---- telling ---------------------------------------------------------------------------------------


def row(name: str, lines: Sequence[Line], base: Sequence[Line], pick: Sequence[int]) -> str:
    """Rates of the prompts with these numbers and, but for the base itself, differences in hundredths."""
    cells = [name]
    for rate in (*RATES, "likeness"):
        known = [i for i in pick if lines[i][rate] is not None]
        if not known:
            cells.append("")
            continue
        ours, theirs = (np.array([x[i][rate] for i in known], float) for x in (lines, base))
        cell = f"{ours.mean():.1%}" if rate in RATES else f"{ours.mean():.3f}"
        if lines is not base:
            factor, digits = (100, 1) if rate in RATES else (1, 3)
            cell += f" ({shown(*interval(factor * (ours - theirs)[None]), digits)})"
        cells.append(cell)
    cost, seconds = (np.mean([lines[i][x] for i in pick]) for x in ("cost", "seconds"))
    return f"| {' | '.join([*cells, f'{cost:.3f}', f'{seconds:.2f}'])} |"


def tables(found: dict[str, list[Line]], prompts: Sequence[Prompt]) -> str:
    parts = {group: [i for i, p in enumerate(prompts) if p.group == group] for group in COUNTS}
    several = [i for i, p in enumerate(prompts) if p.group != "single"]
    parts = {"all of several subjects": several, **parts}
    head = f"| | {' | '.join((*RATES, 'likeness', 'cost', 'seconds'))} |\n|{' --- |' * (len(RATES) + 4)}"
    base, told = found["plain"], []
    for part, pick in parts.items():
        if not pick:
            continue
        rows = [row(name, lines, base, pick) for name, lines in found.items()]
        told.append("\n".join([f"{part.capitalize()}, {len(pick)} prompts:\n", head, *rows]))
    return "\n\n".join(told) + "\n"


def told_by_cost(plain: Sequence[list[Line]], prompts: Sequence[Prompt]) -> str:
    """Of a right and a wrong picture, how often the right one costs less: of two prompts, and of one with two seeds."""
    rows = ["How often the right one of two plain pictures, of which one is wrong, has less of FOCUS's cost:\n",
            "| | of two prompts | of two seeds of a prompt |\n| --- | --- | --- |"]  # fmt: skip
    for group in COUNTS:
        each = [[lines[i] for lines in plain] for i, prompt in enumerate(prompts) if prompt.group == group]
        cells = [group]
        for some in ([[lines[0] for lines in each]], each):
            less = [a["cost"] < b["cost"] for lines in some for a in lines for b in lines
                    if a["all right"] and not b["all right"]]  # fmt: skip
            cells.append(f"{sum(less)} of {len(less)}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def figure(pipe: Pipeline, prompts: Sequence[Prompt], found: dict[str, list[Line]], way: Way, path: Path) -> None:
    """Plain above pushed: the first prompts of which just one is right, which has a green mark, the wrong one a red."""
    both = list(zip(found["plain"], found[way.name]))
    some = [i for i, (a, b) in enumerate(both) if prompts[i].group != "single" and a["all right"] != b["all right"]]
    if not some:
        return
    these = [prompts[i] for i in some[:SHOWN]]
    rows = [[picture for picture, _ in draw(pipe, these, each)] for each in (Way("plain", {}), way)]
    side = rows[0][0].shape[0]
    whole = Image.new("RGB", (side * len(these), 2 * side + HEAD), "white")
    pen = ImageDraw.Draw(whole)
    for x, (i, prompt) in enumerate(zip(some, these)):
        pen.text((x * side + 2, 2), "\n".join(wrap(prompt.text, 24)), fill="black", font_size=9)
        for row, line, y in zip(rows, both[i], (HEAD, HEAD + side)):
            whole.paste(Image.fromarray(row[x]), (x * side, y))
            pen.rectangle((x * side + 2, y + 2, x * side + 9, y + 9), "lime" if line["all right"] else "red", "white")
    whole.quantize(256).save(path, optimize=True)


# ---- all of it -------------------------------------------------------------------------------------


def choose(pipe: Pipeline, prompts: Sequence[Prompt], ways: Sequence[Way], out: Path) -> dict[str, Keywords]:
    """For each loss the way by which pictures are most alike what was asked for."""
    found = {way.name: drawn(pipe, prompts, way, out) for way in (Way("plain", {}), *ways)}
    (out / "table.md").write_text(tables(found, prompts))
    likeness = {name: float(np.mean([line["likeness"] for line in lines])) for name, lines in found.items()}
    return {loss: max((w for w in ways if w.keywords["focus_loss"] == loss), key=lambda w: likeness[w.name]).keywords
            for loss in dict.fromkeys(way.keywords["focus_loss"] for way in ways)}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder (default: the demo model)")
    parser.add_argument("--adapter", default=None, metavar="FILE", help="of adjoint matching: drawn plainly with it")
    parser.add_argument("--chosen", type=Path, default=None, metavar="FILE", help="chosen.json of another run")
    parser.add_argument("--only", default="", metavar="TEXT", help="draw ways whose names have this, and no tables")
    parser.add_argument("--tables", action="store_true", help="of what is drawn already; draw no more")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=Path("out/focus"))
    args = parser.parse_args(arguments)
    choosing = args.out / "choosing"
    choosing.mkdir(parents=True, exist_ok=True)
    prompts, others = (prompts_of({group: max(1, round(args.share * n)) for group, n in counts.items()}, seed)
                       for counts, seed in ((COUNTS, SEED), (COUNTS_CHOOSING, SEED + CHOOSING)))  # fmt: skip
    pipe, path = Pipeline.load(args.model), args.chosen or args.out / "chosen.json"
    if not path.exists():
        if args.only:
            for way in candidates():
                _ = drawn(pipe, others, way, choosing) if args.only in way.name else None
            return
        path.write_text(json.dumps(choose(pipe, others, candidates(), choosing), indent=2) + "\n")
    chosen = json.loads(path.read_text())
    print(f"chosen: {json.dumps(chosen)}", flush=True)
    ways, adapted = main_ways(chosen), Way("adapter", {})
    if args.tables:
        there = {way.name: lines_of(args.out / f"{way.name}.jsonl") for way in (*ways, adapted)}
        found = {name: lines for name, lines in there.items() if len(lines) == len(prompts)}
    else:
        found = {way.name: drawn(pipe, prompts, way, args.out) for way in ways if args.only in way.name}
        if args.adapter is not None and args.only in adapted.name:
            other = Pipeline.load(args.model, lora=[args.adapter])
            found[adapted.name] = drawn(other, prompts, adapted, args.out)
        if args.only:
            return
    pushed = next(way for way in ways if way.pushed and way.name in found)
    figure(pipe, prompts, found, pushed, args.out / "focus.png")
    plain = [found[name] for name in ("plain", "plain again", "plain once more") if name in found]
    found.pop("plain once more", None)
    for n in range(2, len(plain) + 1):
        found[f"best of {n} by FOCUS's cost"] = best_of(plain[:n], lambda line: -line["cost"])
        found[f"best of {n} by the judge (a bound)"] = best_of(plain[:n], lambda x: (x["all right"], x["likeness"]))
    text = f"{tables(found, prompts)}\n{told_by_cost(plain, prompts)}"
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
