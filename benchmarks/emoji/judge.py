"""Which emoji and which ground a picture shows, told by comparing it with rendered glyphs.

For each place, every noun's glyph is put at every offset on the picture's own ground colour, and the one with the
least squared difference is what is there, if the difference is less than 0.3 of the glyph's own energy against the
ground: so a smear, an empty ground or a second subject counts as nothing.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.emoji.scenes import COLOURS, NOUNS, glyph, slot

REACH = 6 / 64  # offsets searched, as a fraction of the side
MISMATCH = 0.3  # of the glyph's energy
FORGIVEN = 5.0  # levels, root mean square


class Verdict(NamedTuple):
    """What a picture shows."""

    nouns: tuple[str | None, ...]  # left to right; None where no glyph is near enough
    colour: str
    mismatch: tuple[float, ...]  # per place: squared difference over the glyph's energy


def judge(picture: np.ndarray, subjects: int) -> Verdict:
    """picture: uint8 `(S, S, 3)`; subjects: how many places to look at, 1 (the middle) or 2 (left and right)."""
    image = torch.from_numpy(picture).float().permute(2, 0, 1)  # (3, S, S)
    rim = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1)], dim=1)  # (3, 4 S)
    ground = rim.median(dim=1).values
    names = list(COLOURS)
    distances = (torch.tensor([COLOURS[name] for name in names]) - ground).square().sum(dim=1)
    found = [look(image, ground, i, subjects) for i in range(subjects)]
    nouns, mismatch = zip(*found)
    return Verdict(nouns, names[int(distances.argmin())], mismatch)


def look(image: Tensor, ground: Tensor, index: int, subjects: int) -> tuple[str | None, float]:
    """The noun at one place and its mismatch."""
    size = image.shape[-1]
    centre, cell = slot(index, subjects)
    side, reach = round(cell * size), round(REACH * size)
    alpha, ink = kernels(side)  # (N, 1, s, s), (N, 3, s, s)
    share = slice(index * size // subjects, (index + 1) * size // subjects)  # columns that belong to this place
    rest = torch.zeros_like(image)
    rest[:, :, share] = image[:, :, share] - ground[:, None, None]
    energy = rest.square().sum()

    # |d - a (c - g)|² = |d|² - 2 d · a (c - g) + |a (c - g)|², the middle term as a correlation over all offsets.
    window = F.pad(rest, (size,) * 4)
    left, top = round(centre * size - side / 2) + size, round(0.5 * size - side / 2) + size
    window = window[None, :, top - reach : top + reach + side, left - reach : left + reach + side]
    difference = ink - alpha * ground[:, None, None]  # a (c - g): (N, 3, s, s)
    correlation = F.conv2d(window, difference)[0].flatten(1)  # (N, offsets)
    own = difference.square().sum(dim=(1, 2, 3))  # (N,)
    error = energy - 2 * correlation.amax(dim=1) + own
    best = int(error.argmin())
    forgiven = 3 * size * size / subjects * FORGIVEN**2
    near = max(0.0, float((error[best] - forgiven) / own[best]))
    return (list(NOUNS)[best] if near < MISMATCH else None), near


@lru_cache(maxsize=8)
def kernels(side: int) -> tuple[Tensor, Tensor]:
    """All glyphs of one size: alpha `(N, 1, s, s)` and alpha times colour `(N, 3, s, s)`."""
    stack = torch.from_numpy(np.stack([glyph(noun, side) for noun in NOUNS])).permute(0, 3, 1, 2)
    alpha = stack[:, 3:] / 255.0
    return alpha, stack[:, :3] * alpha


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    z, rate = 1.959964, right / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
