"""Prompts of several subjects, easy and hard, and what is right of their pictures.

usual   worded as in training; half with colours, half with nouns or colours that training never had together
loose   the same in words that training never had, where the demo drops and mixes subjects
twins   one noun in several colours, which training never had
single  one subject
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from random import Random
from typing import Any, NamedTuple

import numpy as np

from benchmarks.emoji.judge import LOOKS, judge, lay, mixed, prepared, share
from benchmarks.emoji.scenes import COLOURS, NOUNS, PLACES, Scene, Subject, article, held_out, tints_of

RATES = ("present", "in place", "unmixed", "colours", "background", "all right")


class Prompt(NamedTuple):
    """A prompt, and what it should show."""

    group: str
    scene: Scene
    text: str
    seed: int

    @property
    def subjects(self) -> str:
        """As `--focus` takes them: each with its colour."""
        return "; ".join(map(_words, self.scene.subjects))


def prompts_of(counts: dict[str, int], seed: int) -> list[Prompt]:
    """So many prompts of each group; those of several subjects have two, three and four in turn."""
    found: list[Prompt] = []
    for group, number in counts.items():
        rng = Random(f"{group} {seed}")
        for i in range(number):
            count, tinted, unseen = 1 if group == "single" else 2 + i % 3, i // 3 % 2 == 1, i // 6 % 2 == 1
            scene = _twins(rng, count) if group == "twins" else _scene(rng, count, tinted, unseen)
            wording = _WORDINGS[(i + i // 3) % 3]
            if group == "loose" and wording is _in_front:
                scene = Scene(scene.subjects, scene.colour, named_colour=True)
            text = wording(scene) if group == "loose" else scene.caption
            found.append(Prompt(group, scene, text, seed + len(found)))
    return found


def judged(picture: np.ndarray, scene: Scene) -> dict[str, Any]:
    """What is right of a picture, `RATES`, and how like it is to what was asked for.

    present: all its nouns, anywhere. unmixed: no place shows two glyphs in one. colours: of whatever is nearest at each
    place. background: None where the prompt does not say it. likeness: how much of the glyphs asked for is there, the
    mean over places of 1 less the squared difference over the glyph's own energy, each at least 0.
    """
    count, wanted = len(scene.subjects), Counter(scene.nouns)
    verdict, (image, ground) = judge(picture, count), prepared(picture)
    others = (judge(picture, number) for number in PLACES if number != count)
    likeness = []
    for i, subject in enumerate(scene.subjects):
        rest, _ = share(image, ground, i, count)
        laid = lay(rest, ground, i, count, [LOOKS.index((subject.noun, subject.tint))])
        mismatch = (rest.square().sum() + laid.own[0] - 2 * laid.correlation[0]) / laid.own[0]
        likeness.append(max(0.0, 1.0 - float(mismatch)))
    in_place = verdict.nouns == scene.nouns
    coloured = tuple(seen.tint for seen in verdict.places) == scene.tints
    background = verdict.colour == scene.colour if scene.named_colour else None
    return {
        "present": in_place or any(wanted <= Counter(v.nouns) for v in (verdict, *others)),
        "in place": in_place,
        "unmixed": not any(mixed(picture, i, count) for i, seen in enumerate(verdict.places) if not seen.right),
        "colours": coloured,
        "background": background,
        "all right": in_place and coloured and background is not False,
        "likeness": float(np.mean(likeness)),
    }


# ---- scenes ----------------------------------------------------------------------------------------


def _scene(rng: Random, count: int, tinted: bool, unseen: bool) -> Scene:
    """unseen: two nouns and, if tinted, nouns and colours, that training never had together."""
    while True:
        nouns = rng.sample(list(NOUNS), count)
        pairs = any(held_out(*pair) for pair in combinations(nouns, 2))
        if pairs == (unseen and count > 1) and (not tinted or all(tints_of(noun, unseen) for noun in nouns)):
            break
    first = rng.randrange(count)  # at least one is tinted
    tints = [
        rng.choice(tints_of(noun, unseen)) if tinted and (i == first or rng.random() < 0.5) else None
        for i, noun in enumerate(nouns)
    ]
    return _grounded(rng, [Subject(noun, tint) for noun, tint in zip(nouns, tints)])


def _twins(rng: Random, count: int) -> Scene:
    noun = rng.choice([noun for noun in NOUNS if len(tints_of(noun)) >= count])
    return _grounded(rng, [Subject(noun, tint) for tint in rng.sample(tints_of(noun), count)])


def _grounded(rng: Random, subjects: Sequence[Subject]) -> Scene:
    free = [colour for colour in COLOURS if colour not in [subject.tint for subject in subjects]]
    return Scene(tuple(subjects), rng.choice(free), rng.random() < 0.7)


# ---- words -----------------------------------------------------------------------------------------


def _words(subject: Subject) -> str:
    return f"{subject.tint} {subject.noun}" if subject.tint else subject.noun


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _on_ground(scene: Scene) -> str:
    return f" on {article(scene.colour)} {scene.colour} background" if scene.named_colour else ""


def _no_articles(scene: Scene) -> str:
    return _listed(list(map(_words, scene.subjects))) + _on_ground(scene)


def _in_front(scene: Scene) -> str:
    names = _listed([subject.name for subject in scene.subjects])
    return f"{names} in front of {article(scene.colour)} {scene.colour} background"


def _one_article(scene: Scene) -> str:
    first, *others = scene.subjects
    return _listed([first.name, *map(_words, others)]) + _on_ground(scene)


_WORDINGS: tuple[Callable[[Scene], str], ...] = (_no_articles, _in_front, _one_article)
