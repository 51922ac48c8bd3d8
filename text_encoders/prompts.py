"""What a prompt may be: one text or one for each encoder, and how strongly its words count."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmdit.common.errors import SettingsError

NAMES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}  # as users know them
ENCODERS = (*NAMES,)

_ROUND, _SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies by
_MOST = 100.0  # a weight's magnitude
_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+|[\\:])""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Prompt:
    """What the encoders read."""

    text: str
    clip_l: str | None = None  # in the text's place, for this encoder
    clip_g: str | None = None
    t5: str | None = None
    emphasis: bool = False  # whether brackets are weights, as in `weighted`

    def of(self, encoder: str) -> tuple[str, list[float] | None]:
        """What one of ENCODERS reads, and the weight of each of its characters, None where all are 1.

        Raises SettingsError for weights that are too large.
        """
        own = getattr(self, encoder)
        text = self.text if own is None else own
        if not self.emphasis:
            return text, None
        parts = weighted(text)
        weights = [weight for part, weight in parts for _ in part]
        return "".join(part for part, _ in parts), None if all(weight == 1 for weight in weights) else weights


def prompt(text: str, own: Sequence[str | None] = (None, None, None), emphasis: bool = False) -> str | Prompt:
    """A prompt by its texts, the general one and those of ENCODERS; a plain one is its text."""
    found = Prompt(text, *own, emphasis=emphasis)
    return text if found == Prompt(text) else found


def weighted(text: str) -> list[tuple[str, float]]:
    r"""A text in parts, each with its weight; the syntax is that of AUTOMATIC1111's web UI.

    `(words)` multiplies by 1.1, `[words]` by 1 / 1.1, `(words:1.2)` by 1.2; brackets inside others multiply on. `\(`,
    `\)`, `\[`, `\]` and `\\` are the characters themselves, another backslash is text. A bracket that nothing closes
    acts to the end, one that closes nothing is text, and so is a colon with no number and `)` behind it. Round and
    square brackets may overlap: each pair acts on what lies between. (The web UI's BREAK, and its `[a:b:0.5]`, which
    changes the text between steps, are not read.)

    Parts of equal weight are joined, empty ones left out. Raises SettingsError for a weight beyond -100 to 100.
    """
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `found` the brackets begin that are open

    def close(kind: str, factor: float) -> None:
        begin = opened[kind].pop()
        found[begin:] = [(part, weight * factor) for part, weight in found[begin:]]

    for mark in _MARK.finditer(text):
        bracket, weight = mark["bracket"], mark["weight"]
        if bracket in opened:
            opened[bracket].append(len(found))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif bracket == ")" and opened["("]:
            close("(", _ROUND)
        elif bracket == "]" and opened["["]:
            close("[", _SQUARE)
        else:
            found.append((mark["escaped"] or mark[0], 1.0))
    for kind, factor in (("(", _ROUND), ("[", _SQUARE)):
        while opened[kind]:
            close(kind, factor)
    joined: list[tuple[str, float]] = []
    for part, weight in found:
        if not math.isfinite(weight) or abs(weight) > _MOST:
            raise SettingsError(f'the prompt gives "{part:.60}" a weight of {weight:.4g}: expected -100 to 100')
        if joined and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + part, weight
        else:
            joined.append((part, weight))
    return joined
