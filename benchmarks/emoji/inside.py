"""What the demo's blocks and heads do: `python -m benchmarks.emoji.inside OUT_FOLDER [--scenes N]`.

Scenes of two subjects, one of them in a colour not its own, on a ground that is named; pictures are told by `judge`.

- Each part of each block left out: what is still right.
- Each head given what it gathers for another caption, at noise levels on the way: which part of the way from this
  caption's velocity to the other's that is. The other caption has another colour, noun or ground, or swapped places.
- Whole drawings with something of the other caption's in its place: parts of the text, the first steps, what blocks
  compute, the strongest heads. Which of both captions the picture then shows.
- How much of what the tinted noun's token gathers in the text comes from its colour's.
- The picture that each block predicts, and where each block looks for each word (`inside_looks`).

OUT_FOLDER/tables.md, heads.png, looks.png.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.emoji.inside_bench import (
    BATCH,
    KINDS,
    SEED,
    Bench,
    Drawn,
    Head,
    Tape,
    batches,
    changed,
    path,
    scenes,
    strongest,
    tinted,
)
from benchmarks.emoji.inside_looks import grids, looks
from benchmarks.emoji.judge import Verdict, interval
from benchmarks.emoji.scenes import Scene
from mmdit import Pipeline
from mmdit.prepared import Prepared, Row
from text_encoders import Conditioning

JUDGED = ("colour", "place")  # of whole drawings
LEVELS = (0.0, 0.4, 0.8)  # of the steps, where velocities are compared
TOP = (3, 6)  # heads replaced together

Replaced = Callable[[], AbstractContextManager[Any]]


# ---- left out ------------------------------------------------------------------------------------


def left_out(bench: Bench, every: list[Scene], heads: Sequence[Head]) -> dict[str, Drawn]:
    """Drawings without each part, without each of these heads, and without all others of the same attention."""
    ways: dict[str, tuple[str, list[int]] | None] = {"nothing": None}
    ways |= {f"block {i}" + (f", {name}" if name != "block" else ""): (path(i, name), []) for i, name in bench.parts}
    for head in heads:
        others = [number for number in range(bench.config.num_heads) if number != head.number]
        ways[str(head)] = (path(*head[:2]), [head.number])
        ways[f"block {head.block}, {head.attention}, all but head {head.number}"] = (path(*head[:2]), others)
    found = defaultdict[str, Drawn](list)
    for first, some in batches(every):
        text = bench.encode(some)
        for name, way in ways.items():
            with bench.pipe.ablate(way[0], heads=way[1]) if way else nullcontext():
                found[name] += bench.drawn(some, text, first)
    return found


def rates(drawn: Drawn) -> list[tuple[int, int]]:
    """How many are right, of how many: subjects wherever they stand, in place, their colours, the ground.

    Colours are right where the tinted subject is in its tint, of the pictures that have the subject.
    """
    nouns = [Counter(v.nouns) == Counter(s.nouns) for s, v in drawn]
    places, ground = [v.nouns == s.nouns for s, v in drawn], [v.colour == s.colour for s, v in drawn]
    looks = [(s.subjects[tinted(s)], dict(zip(v.nouns, v.tints))) for s, v in drawn]
    colour = [tints[subject.noun] == subject.tint for subject, tints in looks if subject.noun in tints]
    return [(sum(some), len(some)) for some in (nouns, places, colour, ground)]


# ---- parts of the way to another caption's velocity ----------------------------------------------


def shares(bench: Bench, asked: list[Scene], other: list[Scene]) -> dict[Any, np.ndarray]:
    """Of each head, and of larger parts by name, the part of the way to the other caption's velocity, `(scenes,)`.

    The way is that between the velocities v and w of both captions for one noisy latent; with v' where something is
    the other's, its part is (v' - v) (w - v) / |w - v|². The mean over `LEVELS`. That of "all", the pooled text and
    all that the image gathers, is 1 by construction.
    """
    found = defaultdict[Any, list[Tensor]](list)
    for first, some in batches(asked):
        text, others = bench.encode(some), bench.encode(other[first : first + BATCH])
        way = bench.latents(text, first)
        steps = sorted({int(level * bench.steps) for level in LEVELS})
        levels = [shares_at(bench, text, others, way[step], float(bench.sigmas[step])) for step in steps]
        for name in levels[0]:
            found[name].append(torch.stack([level[name] for level in levels]).mean(0))
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def shares_at(bench: Bench, text: Conditioning, others: Conditioning, x: Tensor, sigma: float) -> dict[Any, Tensor]:
    """The same for one noisy latent of each text; unguided."""
    pipe, tape, rows = bench.pipe, Tape(bench), range(len(x))
    mixed = Conditioning(text.context, others.pooled, {})
    own, foreign, between = (pipe.prepare([each]) for each in (text, others, mixed))

    def velocity(of: Prepared) -> Tensor:
        return pipe.predict(x, [Row(of, sigma, row) for row in rows]).flatten(1)

    with tape.record(), pipe.capture(("x", "context")) as seen:
        w = velocity(foreign)
    gathering = [head for head in bench.heads if head.attention == "attn"]
    tried: dict[Any, tuple[Replaced, Prepared]] = {h: (partial(tape.replay, [h], len(x)), own) for h in bench.heads}
    for i in range(bench.config.depth):
        these = [head for head in gathering if head.block == i]
        tried[f"attention of block {i}"] = (partial(tape.replay, these, len(x)), own)
        tried[f"image tokens after block {i}"] = (partial(pipe.patch, seen, "x", (i,)), own)
        tried[f"text tokens after block {i}"] = (partial(pipe.patch, seen, "context", (i,)), own)
    tried["pooled text"] = (nullcontext, between)
    tried["all"] = (partial(tape.replay, gathering, len(x)), between)
    v, found = velocity(own), dict[Any, Tensor]()
    for name, (replaced, of) in tried.items():
        with replaced():
            found[name] = ((velocity(of) - v) * (w - v)).sum(1) / (w - v).square().sum(1)
    return found


def binding(bench: Bench, every: list[Scene]) -> dict[str, np.ndarray]:
    """How much of what a noun's token gathers comes from the token of the colour in the caption, `(scenes, heads)`.

    By block, of the noun in that colour and of the other one; CLIP's tokens, where each word is one; at noise 1.
    """
    found = defaultdict[str, list[np.ndarray]](list)
    for i, scene in enumerate(every):
        words, text, at = scene.caption.split(), bench.encode([scene]), tinted(scene)
        nouns = [words.index(scene.nouns[at]), words.index(scene.nouns[1 - at])]  # behind CLIP's token of the beginning
        blocks = range(bench.config.depth - 1)
        with bench.pipe.capture(("attention",), blocks=blocks, texts=[place + 1 for place in nouns]) as seen:
            bench.pipe.predict(bench.pipe.noise(128, 128, [i]), [Row(bench.pipe.prepare([text]), 1.0, 0)])
        for block in blocks:
            for noun, told in enumerate(("its noun", "the other noun")):
                found[f"block {block}, {told}"].append(seen["texts"][0, block][0, :, noun, nouns[0]].numpy())
    return {name: np.stack(values) for name, values in found.items()}


# ---- whole drawings with something of another caption's ------------------------------------------


def followed(bench: Bench, asked: list[Scene], other: list[Scene], heads: list[Head]) -> dict[str, Drawn]:
    """Drawings with something of the other caption's; heads: from the strongest to the weakest."""
    found, pipe, clip = defaultdict[str, Drawn](list), bench.pipe, bench.clip
    for first, some in batches(asked):
        text, others, tape = bench.encode(some), bench.encode(other[first : first + BATCH]), Tape(bench)
        with pipe.capture(("context", "attn")) as seen, tape.record():
            found["everything"] += bench.drawn(some, others, first)
        clips = torch.cat([others.context[:, :clip], text.context[:, clip:]], 1)
        t5 = torch.cat([text.context[:, :clip], others.context[:, clip:]], 1)
        texts = {"the pooled text": (text.context, others.pooled), "CLIP's tokens": (clips, text.pooled)}
        for name, parts in {**texts, "T5's tokens": (t5, text.pooled)}.items():
            found[name] += bench.drawn(some, Conditioning(*parts, {}), first)
        for count in range(2, bench.steps):
            name = f"the first {count} of {bench.steps} steps, to noise {float(bench.sigmas[count]):.2f}"
            found[name] += bench.drawn(some, text, first, (count, others))
        tried, rows = dict[str, Replaced](), range(len(some))
        for i in range(bench.config.depth - 1):
            tried[f"text tokens after block {i}"] = partial(pipe.patch, seen, "context", (i,), rows=rows)
        for i in range(bench.config.depth):
            tried[f"attention of block {i}"] = partial(pipe.patch, seen, "attn", (i,), rows=rows)
        for count in TOP:
            tried[f"the {count} strongest heads"] = partial(tape.replay, heads[:count], len(some))
            tried[f"the {count} next heads"] = partial(tape.replay, heads[count : 2 * count], len(some))
        for name, replaced in tried.items():
            with replaced():
                found[name] += bench.drawn(some, text, first)
    return found


def shows(kind: str, drawn: Drawn, other: list[Scene]) -> tuple[int, int]:
    """How many pictures show what was asked for, and how many what the other caption does, in what they differ."""

    def same(verdict: Verdict, scene: Scene) -> bool:
        at = slice(tinted(scene), tinted(scene) + 1) if kind == "colour" else slice(0)
        nouns = verdict.nouns == scene.nouns if kind == "place" else verdict.nouns[at] == scene.nouns[at]
        return nouns and verdict.tints[at] == scene.tints[at]

    return sum(same(v, s) for s, v in drawn), sum(same(v, o) for (_, v), o in zip(drawn, other))


# ---- all of it -----------------------------------------------------------------------------------


def told(right: int, count: int) -> str:
    low, high = interval(right, count) if count else (0.0, 1.0)
    return f"{right} of {count} ({low:.0%} to {high:.0%})"


def table_of(rows: Iterable[Sequence[object]]) -> str:
    """In Markdown; the first row is its head."""
    head, *lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *lines]) + "\n"


def measured(bench: Bench, count: int, for_heads: int = BATCH) -> tuple[str, dict[str, dict[Any, np.ndarray]]]:
    """All tables, and the shares of heads by kind. Heads are found in scenes of their own."""
    every, own = scenes(count, SEED), scenes(for_heads, SEED + 1)
    found = {kind: shares(bench, own, [changed(s, kind, Random(kind)) for s in own]) for kind in KINDS}
    order = {kind: strongest(found[kind]) for kind in KINDS}
    parts, swaps = [["the other caption's", *KINDS]], defaultdict[str, list[str]](list)
    names = [name for name in found["colour"] if isinstance(name, str)]
    for name in (*names, *dict.fromkeys(head for kind in KINDS for head in order[kind][: TOP[0]])):
        values = [100 * found[kind][name] for kind in KINDS]
        parts.append([str(name), *(f"{v.mean():.0f} ± {1.96 * v.std() / len(v) ** 0.5:.0f}" for v in values)])
    for kind in JUDGED:
        other = [changed(s, kind, Random(kind)) for s in every]
        for name, drawn in followed(bench, every, other, order[kind]).items():
            swaps[name] += [told(n, count) for n in shows(kind, drawn, other)]
    heads = [f"head {number}" for number in range(bench.config.num_heads)]
    bound = [[name, *(f"{100 * x:.0f}" for x in v.mean(0))] for name, v in binding(bench, own).items()]
    missing = left_out(bench, every, list(dict.fromkeys(order[kind][0] for kind in KINDS)))
    tables = (
        [["without", "subjects", "in place", "colour, where the subject is", "ground"],
         *([name, *(told(*rate) for rate in rates(drawn))] for name, drawn in missing.items())],
        parts,
        [["from the colour's token to", *heads], *bound],
        [["the other caption's", *(f"{kind} {whose}" for kind in JUDGED for whose in ("asked for", "of the other"))],
         *([name, *cells] for name, cells in swaps.items())],
    )  # fmt: skip
    return "\n".join(map(table_of, tables)), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--scenes", type=int, default=40)
    args = parser.parse_args()
    start, bench = time.process_time(), Bench(Pipeline.load(device="cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    looks(bench).save(args.out / "looks.png", optimize=True)
    tables, found = measured(bench, args.scenes)
    (args.out / "tables.md").write_text(tables)
    grids(bench, found).save(args.out / "heads.png", optimize=True)
    print(f"{tables}\n{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
