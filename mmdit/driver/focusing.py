"""From settings to what a picture's steps look at: where its subjects' words are, and what keeps them apart."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from mmdit.common.errors import SettingsError
from mmdit.driver.reading import lengths_of, texts_of
from mmdit.driver.sampling import sigmas_of
from mmdit.driver.settings import Settings
from mmdit.maps import Look
from samplers import PROMPT
from samplers.focus import COSTS, GAINS, Attended, Controller
from text_encoders import EncodesText, TextEncoder
from text_encoders.conditioning import as_prompt
from text_encoders.subjects import Found, apart, find, subjects_of

FOCUS, MAPS = "focus", "attention_maps"
_BETWEEN = ("conform", "attend-and-excite")  # losses that see no difference within a subject


class Sheet(NamedTuple):
    """What was seen of a picture after one of its steps, in words of the user's."""

    attended: Attended
    subjects: dict[str, tuple[int, ...]]  # that maps were wanted of: which of the maps' tokens are its

    def of(self, subject: str) -> Tensor:
        """How much each place attends to a subject's words, in each block `(blocks, rows, columns)`: their mean."""
        return self.attended.maps[:, list(self.subjects[subject])].mean(dim=1)


def steep(s: Settings) -> bool:
    """Whether gradients are wanted."""
    return s.focus is not None and s.focus_scale > 0


def check_pushed(s: Settings, sigmas: Tensor) -> None:
    """Raise SettingsError where no step is noisy enough to be pushed. sigmas: the noise levels of all steps."""
    first = float(sigmas[0])
    if steep(s) and first < s.focus_until:
        raise SettingsError(
            f"focus_until is {s.focus_until}, but the picture begins at noise {first:.3f}, so focus would do nothing: "
            "expected less"
        )


def found_in(s: Settings, reader: EncodesText) -> dict[str, list[Found]]:
    """Where the words are that options name; SettingsError where they are not, or cannot be kept apart."""
    found: dict[str, list[Found]] = {}
    (length, chunks), prompt = lengths_of(s), texts_of(s)[PROMPT].prompt
    for option in (FOCUS, MAPS):
        named: str | None = getattr(s, option)
        if named is not None:
            found[option] = find(reader, prompt, subjects_of(named, option), length, chunks, option)
    subjects = found.get(FOCUS, [])
    apart(subjects, FOCUS)
    # What compares subjects needs two of them; what compares words, two of these.
    lonely = len(subjects) == 1 and (s.focus_loss in _BETWEEN or len(subjects[0].columns) == 1)
    if steep(s) and lonely and s.focus_loss != "divide-and-bind":
        raise SettingsError(f'{FOCUS}: "{subjects[0].phrase:.60}" alone cannot be kept apart: expected two or more')
    return found


def tokens_of(s: Settings, reader: EncodesText) -> dict[str, list[tuple[str, int]]]:
    """The prompt's tokens by encoder: the text of each, and its place in the context; none where it is cut off."""
    if not isinstance(reader, TextEncoder):
        return {}
    (length, chunks), prompt = lengths_of(s), as_prompt(texts_of(s)[PROMPT].prompt)
    found: dict[str, list[tuple[str, int]]] = {}
    for encoder in [*reader.clips, *(["t5"] if reader.t5_mode == "on" else [])]:
        (read,) = reader.read(encoder, [prompt])
        places = [reader.column(encoder, i, length, chunks) for i in range(len(read.spans))]
        pieces = [read.text[first:last].strip() for first, last in read.spans]
        found[encoder] = [(piece, place) for piece, place in zip(pieces, places) if place is not None]
    return found


class Focusing:
    """What one picture's steps look at; `controllers` makes what guidance does with it anew."""

    def __init__(self, s: Settings, reader: EncodesText, shift: float) -> None:
        """shift: the model's own."""
        self._settings, self._found, self._shift = s, found_in(s, reader), shift
        every = (column for some in self._found.values() for one in some for column in one.columns)
        self.tokens = tuple(sorted(set(every)))

    def _places(self, found: Sequence[Found]) -> list[tuple[int, ...]]:
        """Which of the tokens are each one's."""
        return [tuple(self.tokens.index(column) for column in one.columns) for one in found]

    def controllers(self) -> list[Controller]:
        """One, or none where nothing is to be looked at."""
        s, wanted = self._settings, MAPS in self._found
        look = partial(Look, self.tokens)
        if not steep(s):
            return [Controller(look, always=True)] if wanted else []
        groups = self._places(self._found[FOCUS])
        picked = [place for group in groups for place in group]
        places = iter(range(len(picked)))
        own = tuple(tuple(next(places) for _ in group) for group in groups)
        cost = COSTS[s.focus_loss](own, released=s.focus_gain == "code")
        gain, levels = GAINS[s.focus_gain], sigmas_of(s, self._shift)
        return [
            Controller(look, cost, picked, s.focus_scale, gain, s.focus_until, partial(height, levels), always=wanted)
        ]

    def sheet(self, controllers: Sequence[Controller]) -> Sheet | None:
        """What they saw in this step; None where nothing was to be seen."""
        seen = next((seen for controller in controllers if (seen := controller.taken()) is not None), None)
        maps = self._found.get(MAPS, ())
        return None if seen is None else Sheet(
            seen, dict(zip((one.phrase for one in maps), self._places(maps)))
        )  # fmt: skip


def height(sigmas: Tensor, sigma: float) -> float:
    """By how much the step that begins at or above a noise level lowers it, `(steps + 1,)` being all levels."""
    below = sigmas[sigmas < sigma - 1e-6]
    return max(sigma - float(below[0]), 1e-6) if len(below) else 1e-6


def pieces(found: dict[str, list[Found]]) -> list[str]:
    """What of the prompt was taken for each subject, a line each."""
    lines = []
    for one in {one.phrase: one for some in found.values() for one in some}.values():
        told = [f"{encoder} {' '.join(map(repr, texts))}" for encoder, texts in one.pieces.items()]
        lines.append(f'"{one.phrase}": {", ".join(told)}')
    return lines
