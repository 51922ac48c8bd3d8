"""What `inside` works with: scenes, the model that draws them, and what its heads gather, kept and put elsewhere."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.emoji.judge import Verdict, judge
from benchmarks.emoji.scenes import COLOURS, NOUNS, Scene, held_out, random_scene, tints_of
from mmdit import Pipeline
from mmdit.inside import OUTPUTS
from samplers import shifted_sigmas
from text_encoders import Conditioning

SEED, STEPS, CFG, BATCH = 80_000_000, 10, 3.0, 20
KINDS = ("colour", "ground", "place", "noun")  # what two captions differ in
ATTENTIONS = ("attn", "context_attn", "attn2")

Drawn = list[tuple[Scene, Verdict]]
Before = tuple[int, Conditioning]  # a number of first steps, and the text that they are told


class Head(NamedTuple):
    block: int
    attention: str
    number: int

    def __str__(self) -> str:
        return f"block {self.block}, {self.attention}, head {self.number}"


def strongest(found: dict[Any, np.ndarray]) -> list[Head]:
    """By the mean of what was found of each; there may be more than heads in it."""
    return sorted((name for name in found if isinstance(name, Head)), key=lambda head: -found[head].mean())


def scenes(count: int, seed: int) -> list[Scene]:
    """Two subjects, the left or the right one tinted; the ground is named."""
    rng, found = Random(seed), list[Scene]()
    for i in range(count):
        scene = replace(random_scene(rng, 2, tinted=0.0), named_colour=True)
        tint = rng.choice([c for c in tints_of(scene.nouns[i % 2]) if c != scene.colour])
        found.append(with_subject(scene, i % 2, tint=tint))
    return found


def tinted(scene: Scene) -> int:
    return next(i for i, tint in enumerate(scene.tints) if tint)


def with_subject(scene: Scene, at: int, **more: Any) -> Scene:
    return replace(scene, subjects=tuple(replace(s, **more) if i == at else s for i, s in enumerate(scene.subjects)))


def changed(scene: Scene, kind: str, rng: Random) -> Scene:
    """The scene in another colour, on another ground, with swapped places, with another noun that is not tinted."""
    at = tinted(scene)
    taken = (scene.colour, scene.tints[at])
    if kind == "place":
        return replace(scene, subjects=scene.subjects[::-1])
    if kind == "ground":
        return replace(scene, colour=rng.choice([c for c in COLOURS if c not in taken]))
    if kind == "colour":
        return with_subject(scene, at, tint=rng.choice([c for c in tints_of(scene.nouns[at]) if c not in taken]))
    nouns = [n for n in NOUNS if n not in scene.nouns and not held_out(n, scene.nouns[at])]
    return with_subject(scene, 1 - at, noun=rng.choice(nouns))


def batches(every: list[Scene]) -> Iterator[tuple[int, list[Scene]]]:
    yield from ((i, every[i : i + BATCH]) for i in range(0, len(every), BATCH))


def path(block: int, part: str) -> str:
    return f"joint_blocks.{block}" + (f".{OUTPUTS[part]}" if part in OUTPUTS else "")


class Bench:
    """The model, and the ways of drawing that all experiments share."""

    def __init__(self, pipe: Pipeline, steps: int = STEPS) -> None:
        self.pipe, self.steps, self.config = pipe, steps, pipe.transformer.config
        self.length = pipe.settings.resolved(pipe.defaults).t5_length or 0
        self.empty, self.sigmas = pipe.encode([""], self.length), shifted_sigmas(steps, pipe.shift)
        self.clip = self.empty.tokens["clip_l"].shape[1]  # tokens of the context before T5's
        modules = dict(pipe.transformer.named_modules())
        every = [(i, name) for i in range(self.config.depth) for name in ("block", *OUTPUTS)]
        last = (self.config.depth - 1, "context_attn")  # it gathers nothing
        self.parts = [part for part in every if path(*part) in modules and part != last]
        numbers = range(self.config.num_heads)
        self.heads = [Head(i, name, n) for i, name in self.parts if name in ATTENTIONS for n in numbers]

    def encode(self, some: Iterable[Scene]) -> Conditioning:
        return self.pipe.encode([scene.caption for scene in some], self.length)

    def latents(self, text: Conditioning, first: int, before: Before | None = None) -> list[Tensor]:
        """Before each step and at the end, each `(B, C, h, w)`; picture i has seed first + i."""
        count, (steps, other) = len(text.pooled), before or (0, text)
        velocities = [self.pipe.velocity(t, self.empty, CFG, count) for t in (text, other)]
        found = [self.pipe.noise(128, 128, range(SEED + first, SEED + first + count))]
        for step, (sigma, after) in enumerate(pairwise(self.sigmas)):
            found.append(found[-1] + (after - sigma) * velocities[step < steps](found[-1], sigma))
        return found

    def drawn(self, some: list[Scene], text: Conditioning, first: int, before: Before | None = None) -> Drawn:
        """Scenes with what their pictures show."""
        pictures = self.pipe.decode(self.latents(text, first, before)[-1]).numpy()
        return [(scene, judge(picture, 2)) for scene, picture in zip(some, pictures)]


class Tape:
    """What every head gathers in one run, put in the places of some in another."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.kept = bench, dict[tuple[str, int], Tensor]()

    def record(self) -> ExitStack:
        def keep(place: str, step: int, value: Tensor) -> Tensor:
            return self.kept.setdefault((place, step), value.clone())

        return self.hooked(self.bench.heads, keep)

    def replay(self, heads: Sequence[Head], rows: int) -> ExitStack:
        """rows: the first of the batch, those of the prompts."""
        return self.hooked(heads, lambda at, step, value: torch.cat([self.kept[at, step][:rows], value[rows:]]))

    def hooked(self, heads: Sequence[Head], way: Callable[[str, int, Tensor], Tensor]) -> ExitStack:
        stack, every = ExitStack(), defaultdict[str, list[int]](list)
        for head in heads:
            every[path(*head[:2])].append(head.number)
        for place, numbers in every.items():
            stack.enter_context(self.bench.pipe.ablate(place, heads=numbers, by=partial(way, place)))
        return stack
