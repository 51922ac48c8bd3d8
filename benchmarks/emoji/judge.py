"""Which emoji in which colours a picture shows, and on which ground, told by comparing it with rendered glyphs.

For each place, every noun's glyph in every colour is put at every offset on the picture's own ground colour, and the
one with the least squared difference is what is there, if the difference is less than a quarter of the glyph's own energy
against the ground: so a smear, an empty ground or a second subject counts as nothing. The search is at half the
resolution first, and at the whole for the nearest few.
"""

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.emoji.scenes import CELL, COLOURS, JITTER, NOUNS, PLACES, Scene, glyph, tints_of

SLACK = 2 / 64  # how much further than a scene's jitter a glyph is looked for, as a fraction of the side
MISMATCH = 0.25  # of the glyph's energy; at 0.3 a mere blot can pass for a glyph
BLURRED = 0.6  # a mismatch up to which a glyph can still be recognised
FORGIVEN = 5.0  # levels, root mean square
FEW = 12  # looks compared at the whole resolution

Look = tuple[str, str | None]  # a noun and its tint
LOOKS: list[Look] = [
    (noun, tint) for noun in NOUNS for tint in (None, *sorted(tints_of(noun) + tints_of(noun, unseen=True)))
]


class Seen(NamedTuple):
    """What is at one place."""

    noun: str  # of the nearest look, however far
    tint: str | None
    mismatch: float  # squared difference over the glyph's energy
    empty: bool  # nothing but ground

    @property
    def right(self) -> bool:
        return self.mismatch < MISMATCH and not self.empty


class Verdict(NamedTuple):
    """What a picture shows."""

    places: tuple[Seen, ...]  # in the order of the caption
    colour: str

    @property
    def nouns(self) -> tuple[str | None, ...]:
        return tuple(seen.noun if seen.right else None for seen in self.places)

    @property
    def tints(self) -> tuple[str | None, ...]:
        return tuple(seen.tint if seen.right else None for seen in self.places)


def judge(picture: np.ndarray, subjects: int) -> Verdict:
    """picture: uint8 `(H, W, 3)`; subjects: how many places to look at, 1 to 4."""
    image = torch.from_numpy(picture).float().permute(2, 0, 1)  # (3, H, W)
    rim = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1)], dim=1)
    ground = rim.median(dim=1).values
    names = list(COLOURS)
    distances = (torch.tensor([COLOURS[name] for name in names]) - ground).square().sum(dim=1)
    places = tuple(look(image, ground, i, subjects) for i in range(subjects))
    return Verdict(places, names[int(distances.argmin())])


def look(image: Tensor, ground: Tensor, index: int, subjects: int) -> Seen:
    """The look that is nearest at one place."""
    rest = torch.zeros_like(image)
    rows, columns = share(image, index, subjects)
    rest[:, rows, columns] = image[:, rows, columns] - ground[:, None, None]
    energy = rest.square().sum()
    forgiven = rest[:, rows, columns].numel() * FORGIVEN**2

    coarse = F.avg_pool2d(rest[None], 2)[0]
    error, _ = errors(coarse, ground, index, subjects, list(range(len(LOOKS))))
    nearest = error.topk(FEW, largest=False).indices.tolist()
    error, own = errors(rest, ground, index, subjects, nearest)
    best = int(error.argmin())
    mismatch = max(0.0, float((energy + error[best] - forgiven) / own[best]))
    noun, tint = LOOKS[nearest[best]]
    return Seen(noun, tint, mismatch, empty=bool(energy < forgiven + 0.1 * own[best]))


def share(image: Tensor, index: int, subjects: int) -> tuple[slice, slice]:
    """The rows and columns that belong to a place."""
    _, height, width = image.shape
    x, y = PLACES[subjects][index]
    return half(height, y), half(width, x)


def half(side: int, centre: float) -> slice:
    """The part of a side that a place at its middle, in its first or in its second half has."""
    return slice(0, side) if centre == 1 / 2 else slice(int(centre * 2) * side // 2, (int(centre * 2) + 1) * side // 2)


def errors(rest: Tensor, ground: Tensor, index: int, subjects: int, looks: list[int]) -> tuple[Tensor, Tensor]:
    """For every look, at its best offset: the squared difference less the picture's energy, and the look's own energy.

    |d - a (c - g)|² = |d|² - 2 d · a (c - g) + |a (c - g)|², the middle term as a correlation over all offsets.
    """
    _, height, width = rest.shape
    short = min(height, width)
    side, reach = round(CELL[subjects] * short), math.ceil((JITTER[subjects] / 64 + SLACK) * short)
    alpha, ink = kernels(side)  # (N, 1, s, s), (N, 3, s, s)
    difference = ink[looks] - alpha[looks] * ground[:, None, None]  # a (c - g): (N, 3, s, s)
    x, y = PLACES[subjects][index]
    left, top = round(x * width - side / 2) + short, round(y * height - side / 2) + short
    window = F.pad(rest, (short,) * 4)
    window = window[None, :, top - reach : top + reach + side, left - reach : left + reach + side]
    correlation = F.conv2d(window, difference)[0].flatten(1)  # (N, offsets)
    own = difference.square().sum(dim=(1, 2, 3))  # (N,)
    return own - 2 * correlation.amax(dim=1), own


@lru_cache(maxsize=8)
def kernels(side: int) -> tuple[Tensor, Tensor]:
    """All looks in one size: alpha `(N, 1, s, s)` and alpha times colour `(N, 3, s, s)`."""
    stack = torch.from_numpy(np.stack([glyph(noun, side, tint) for noun, tint in LOOKS])).permute(0, 3, 1, 2)
    alpha = stack[:, 3:] / 255.0
    return alpha.contiguous(), stack[:, :3] * alpha


def failure(scene: Scene, verdict: Verdict, picture: np.ndarray) -> str | None:
    """What is wrong with the subjects of a picture, in a word; None if all stand in place in their colours.

    missing: an empty place. doubled: a noun more often than asked. swapped places: the right nouns, elsewhere.
    other number: the picture is one of more or fewer subjects. blurred: the right glyph, too far from clean. mixed: no
    glyph, or parts of several. another: a noun that was not asked for. swapped colours: the right nouns in each other's
    colours. wrong colour: in any other.
    """
    if verdict.nouns == scene.nouns:
        if verdict.tints == scene.tints:
            return None
        return "swapped colours" if Counter(verdict.tints) == Counter(scene.tints) else "wrong colour"
    wrong = [(seen, noun) for seen, noun in zip(verdict.places, scene.nouns) if not seen.right or seen.noun != noun]
    if any(seen.empty for seen, _ in wrong):
        return "missing"
    if Counter(verdict.nouns) == Counter(scene.nouns):
        return "swapped places"
    if any(count > 1 for noun, count in Counter(verdict.nouns).items() if noun in scene.nouns):
        return "doubled"
    if all(seen.right for seen, _ in wrong):
        return "another"
    others = (judge(picture, count) for count in PLACES if count != len(scene.subjects))
    if any(None not in other.nouns for other in others):
        return "other number"
    unclear = [(seen, noun) for seen, noun in wrong if not seen.right]
    return "blurred" if all(s.noun == noun and s.mismatch < BLURRED for s, noun in unclear) else "mixed"


FAILURES = (
    "missing", "doubled", "swapped places", "other number", "another", "blurred", "mixed", "swapped colours",
    "wrong colour",
)  # fmt: skip


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    z, rate = 1.959964, right / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
