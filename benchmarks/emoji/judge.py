"""Which emoji in which colours a picture shows, and on which ground, told by comparing it with rendered glyphs.

For each place, every noun's glyph in every colour is put at every offset on the picture's own ground colour, and the
one with the least squared difference is what is there, if the difference is less than a quarter of the glyph's own
energy against the ground: so a smear, an empty ground or a second subject counts as nothing. The search is at half the
resolution first, and at the whole for the nearest few.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.emoji.scenes import CELL, COLOURS, JITTER, NOUNS, PLACES, Scene, glyph, tints_of

SLACK = 2 / 64  # how much further than a scene's jitter a glyph is looked for, as a fraction of the side
MISMATCH = 0.25  # of the glyph's energy; at 0.3 a mere blot can pass for a glyph
MIXED = 0.5  # of what one glyph leaves unexplained, what two may leave where they are mixed
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
    image, ground = prepared(picture)
    names = list(COLOURS)
    distances = (torch.tensor([COLOURS[name] for name in names]) - ground).square().sum(dim=1)
    places = tuple(look(image, ground, i, subjects) for i in range(subjects))
    return Verdict(places, names[int(distances.argmin())])


def prepared(picture: np.ndarray) -> tuple[Tensor, Tensor]:
    """A picture as `(3, H, W)`, and the colour of its ground."""
    image = torch.from_numpy(picture).float().permute(2, 0, 1)
    rim = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1)], dim=1)
    return image, rim.median(dim=1).values


def look(image: Tensor, ground: Tensor, index: int, subjects: int) -> Seen:
    """The look that is nearest at one place."""
    rest, pixels = share(image, ground, index, subjects)
    energy, forgiven = rest.square().sum(), pixels * FORGIVEN**2
    coarse = F.avg_pool2d(rest[None], 2)[0]
    laid = lay(coarse, ground, index, subjects, range(len(LOOKS)))
    nearest = (laid.own - 2 * laid.correlation).topk(FEW, largest=False).indices.tolist()
    laid = lay(rest, ground, index, subjects, nearest)
    own = laid.own
    error = own - 2 * laid.correlation  # |d - a (c - g)|² = |d|² - 2 d · a (c - g) + |a (c - g)|²
    best = int(error.argmin())
    mismatch = max(0.0, float((energy + error[best] - forgiven) / own[best]))
    noun, tint = LOOKS[nearest[best]]
    return Seen(noun, tint, mismatch, empty=bool(energy < forgiven + 0.1 * own[best]))


def share(image: Tensor, ground: Tensor, index: int, subjects: int) -> tuple[Tensor, int]:
    """What the picture has besides its ground in the part that belongs to a place, and how many numbers that is."""
    _, height, width = image.shape
    x, y = PLACES[subjects][index]
    rows, columns = half(height, y), half(width, x)
    rest = torch.zeros_like(image)
    rest[:, rows, columns] = image[:, rows, columns] - ground[:, None, None]
    return rest, rest[:, rows, columns].numel()


def half(side: int, centre: float) -> slice:
    """The part of a side that a place at its middle, in its first or in its second half has."""
    return slice(0, side) if centre == 1 / 2 else slice(int(centre * 2) * side // 2, (int(centre * 2) + 1) * side // 2)


class Laid(NamedTuple):
    """Looks laid on a picture less its ground, each at the offset where both agree best."""

    difference: Tensor  # what each look adds to the ground, (N, 3, s, s)
    correlation: Tensor  # its product with the picture there, (N,)
    left: Tensor  # the corner where it lies, (N,) both
    top: Tensor

    @property
    def own(self) -> Tensor:
        """Each look's own energy, (N,)."""
        return self.difference.square().sum(dim=(1, 2, 3))


def lay(rest: Tensor, ground: Tensor, index: int, subjects: int, looks: Sequence[int]) -> Laid:
    _, height, width = rest.shape
    short = min(height, width)
    side, reach = round(CELL[subjects] * short), math.ceil((JITTER[subjects] / 64 + SLACK) * short)
    alpha, ink = kernels(side)  # (N, 1, s, s), (N, 3, s, s)
    difference = ink[looks] - alpha[looks] * ground[:, None, None]
    x, y = PLACES[subjects][index]
    left, top = round(x * width - side / 2) - reach, round(y * height - side / 2) - reach
    window = F.pad(rest, (short,) * 4)[None, :, short + top :, short + left :]
    window = window[..., : 2 * reach + side, : 2 * reach + side]
    correlation, offset = F.conv2d(window, difference)[0].flatten(1).max(dim=1)
    across = 2 * reach + 1
    return Laid(difference, correlation, left + offset % across, top + offset // across)


def mixed(picture: np.ndarray, index: int, subjects: int) -> bool:
    """Whether two nouns together explain what is at a place much better than any one does, each in any strength."""
    image, ground = prepared(picture)
    rest = F.avg_pool2d(share(image, ground, index, subjects)[0][None], 2)[0]
    laid = lay(rest, ground, index, subjects, range(len(LOOKS)))
    agreement = laid.correlation.clamp(min=0) / laid.own.sqrt()
    chosen: dict[str, int] = {}  # the look of each noun that agrees best
    for i in agreement.argsort(descending=True).tolist():
        chosen.setdefault(LOOKS[i][0], i)
    basis = torch.stack([canvas(laid, i, rest) for i in chosen.values()])  # (nouns, P)
    basis = basis / basis.norm(dim=1, keepdim=True).clamp(min=1e-3)
    product, target = basis @ basis.T, basis @ rest.flatten()
    # The best weights of two unit vectors with cosine c: |d|² less this is what they leave.
    both = target[:, None].square() + target[None].square() - 2 * product * target[:, None] * target[None]
    both = both / (1 - product.square()).clamp(min=0.05)
    both.masked_fill_((target[:, None] <= 0) | (target[None] <= 0), 0.0)
    energy = rest.square().sum()
    return bool(energy - both.max() < MIXED * (energy - target.clamp(min=0).square().max()))


def canvas(laid: Laid, i: int, rest: Tensor) -> Tensor:
    """One look where it lies, as a flat picture."""
    side, short = laid.difference.shape[-1], min(rest.shape[1:])
    padded = F.pad(torch.zeros_like(rest), (short,) * 4)
    left, top = int(laid.left[i]) + short, int(laid.top[i]) + short
    padded[:, top : top + side, left : left + side] = laid.difference[i]
    return padded[:, short:-short, short:-short].flatten()


@lru_cache(maxsize=8)
def kernels(side: int) -> tuple[Tensor, Tensor]:
    """All looks in one size: alpha `(N, 1, s, s)` and alpha times colour `(N, 3, s, s)`."""
    stack = torch.from_numpy(np.stack([glyph(noun, side, tint) for noun, tint in LOOKS])).permute(0, 3, 1, 2)
    alpha = stack[:, 3:] / 255.0
    return alpha.contiguous(), stack[:, :3] * alpha


def failure(scene: Scene, verdict: Verdict, picture: np.ndarray) -> str | None:
    """What is wrong with the subjects of a picture, in a word; None if all stand in place in their colours.

    missing: an empty place. doubled: a noun more often than asked. swapped places: the right nouns, elsewhere.
    other number: the picture is one of more or fewer subjects. another: a noun that was not asked for. mixed: two
    glyphs in one. blurred: any other shape that is no glyph. swapped colours: the right nouns in each other's colours.
    wrong colour: in any other.
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
    count = len(scene.subjects)
    unclear = [i for i, seen in enumerate(verdict.places) if not seen.right]
    return "mixed" if any(mixed(picture, i, count) for i in unclear) else "blurred"


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
