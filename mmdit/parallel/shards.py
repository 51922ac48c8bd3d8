"""A list cut into shards and parts: the same for everybody who has the list, whatever of it is there already."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mmdit.driver.loop import kind
from mmdit.driver.settings import Settings, identity
from mmdit.images.options import steps_of
from mmdit.parallel.options import two_numbers

_LARGEST = 16  # pictures of a part: so many are lost to the work of others if a machine dies, minutes of a GPU
_PARTS = 64  # of a short list, so that several have work until its end

Placed = tuple[Settings, Path | None]  # a picture and its file; None: it is there, or comes twice in the list


class Part(NamedTuple):
    """Some pictures of one kind, one after another."""

    name: str  # a hash of what they show
    pictures: list[Placed]


def shard_of(pictures: Sequence[Placed], shard: str) -> list[Placed]:
    """The pictures of shard I/N of all of a list, in an order of its own.

    Pictures of a kind stand together, in the order of the list; each shard is a stretch of these with an equal share
    of the work. So a shard has few kinds, whose pictures are drawn together, and a prompt's pictures have one text to
    encode; shards of equal numbers of rows would have unequal work where sizes or steps differ, and every N-th row
    would have all kinds.
    """
    number, shards = two_numbers(shard, "/") or (1, 1)
    every = [placed for alike in _kinds(pictures) for placed in alike]
    works = [work(s) for s, _ in every]
    whole, before, own = sum(works), 0, []
    for placed, each in zip(every, works):
        if (2 * before + each) * shards // (2 * whole) == number - 1:  # where the middle of its work lies
            own.append(placed)
        before += each
    return own


def parts_of(pictures: Sequence[Placed], out: str) -> list[Part]:
    """All pictures of a list or shard, cut into parts of one kind each. out: the folder of the run."""
    parts, most = [], max(1, min(_LARGEST, len(pictures) // _PARTS))
    for alike in _kinds(pictures):
        pieces = -(-len(alike) // most)
        edges = [len(alike) * i // pieces for i in range(pieces + 1)]
        cut = [alike[start:end] for start, end in pairwise(edges)]
        parts += [Part(part_name([s for s, _ in piece], out), piece) for piece in cut]
    return parts


def work(s: Settings) -> int:
    """What a picture takes, in steps times pixels times texts; of its first pass, where there are two."""
    assert s.width and s.height
    return max(1, steps_of(s)) * s.width * s.height * (1 if s.cfg == 1 else 2)


def _kinds(pictures: Sequence[Placed]) -> Iterator[list[Placed]]:
    found: dict[Settings, list[Placed]] = {}
    for placed in pictures:
        found.setdefault(kind(placed[0]), []).append(placed)
    yield from found.values()


def part_name(pictures: Sequence[Settings], out: str) -> str:
    """Machines may see the run's folder under different paths: what goes there is not told by its place."""
    told = [(identity(replace(s, device="auto")), "" if _same_place(s.out, out) else s.out) for s in pictures]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def _same_place(one: str, other: str) -> bool:
    """Whether two paths are the same, however they are spelled: the folder of actors is a whole path."""
    return one == other or os.path.abspath(os.path.expanduser(one)) == os.path.abspath(os.path.expanduser(other))
