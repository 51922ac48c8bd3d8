"""Words of a prompt that a user names, and where their tokens are in the transformer's context."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmdit.common.errors import SettingsError
from mmdit.common.options import wrong
from text_encoders.prompts import NAMES, Prompt

if TYPE_CHECKING:
    from text_encoders.conditioning import EncodesText, TextEncoder
    from text_encoders.tokenizers import Read

_MOST = 32  # subjects
_ITEM = re.compile(r"(?:^|;)(?P<phrase>(?:\\[;#\\]|[^;#])*)(?:#(?P<which>[^;]*))?")
_ESCAPED = re.compile(r"\\([;#\\])")


class Subject(NamedTuple):
    """Words of a prompt."""

    phrase: str
    which: int = 1  # of the places where the prompt has the phrase, from 1

    @property
    def name(self) -> str:
        return self.phrase if self.which == 1 else f"{self.phrase}#{self.which}"


class Found(NamedTuple):
    """Where a subject is."""

    phrase: str  # the subject's name: as "horse" or "horse#2"
    columns: tuple[int, ...]  # its tokens' places in the context, from the lowest
    pieces: dict[str, list[str]]  # what of the text each of its tokens stands for, by encoder


def subjects_of(text: str, option: str = "subjects") -> list[Subject]:
    r"""The subjects of a list as a user writes it: "red horse; bear; horse#2".

    `horse#2` is the second horse of the prompt. `\;`, `\#` and `\\` are the characters themselves, another backslash is
    text. Raises SettingsError, which begins with the option's name, for an empty subject, one that is named twice, a
    number that is none, and more than 32 subjects.
    """
    found: dict[Subject, Subject] = {}  # by what tells them apart
    for item in _ITEM.finditer(text):
        phrase, which = _ESCAPED.sub(r"\1", item["phrase"].strip()), item["which"]
        if not phrase:
            raise wrong(option, text, 'words of the prompt, with ";" between subjects and none empty')
        if which is not None and not re.fullmatch(r"0*[1-9][0-9]{0,3}", which.strip()):
            raise SettingsError(
                f'{option}: "{phrase:.60}#{which:.20}": expected a number from 1 behind #; \\# is the character itself'
            )
        subject = Subject(phrase, 1 if which is None else int(which))
        same = found.setdefault(subject._replace(phrase=_folded(phrase)[0]), subject)
        if same is not subject:
            raise SettingsError(f'{option}: "{subject.name:.60}" is named twice; "{phrase:.60}#2" is the second of two')
    if len(found) > _MOST:
        raise SettingsError(f"{option} names {len(found)} subjects: expected {_MOST} at most")
    return [*found.values()]


def occurrences(text: str, phrase: str) -> list[tuple[int, int]]:
    """Where a text has a phrase: begin and end of each place, which do not overlap.

    Small letters and capitals are equal, so are an accented letter and a letter with its accent (the caseless matching
    of Unicode 3.13, D145, of each character), and any white space. The phrase is no part of a longer word: no letter or
    digit stands directly before or behind it. Those of scripts with no blanks between words do not count.
    """
    have, places = _folded(text)
    want, _ = _folded(phrase.strip())
    assert want
    found, at = list[tuple[int, int]](), have.find(want)
    while at >= 0:
        last = at + len(want) - 1
        begin, end = places[at], places[last] + 1
        whole = places[at - 1 : at] != [begin] and places[last + 1 : last + 2] != [end - 1]  # no part of a character
        if whole and not _in_word(text[begin - 1 : begin]) and not _in_word(text[end : end + 1]):
            found.append((begin, end))
            at = last
        at = have.find(want, at + 1)
    return found


def find(
    reader: EncodesText,
    prompt: str | Prompt,
    subjects: Sequence[Subject],
    t5_length: int | None = None,
    chunks: int = 1,
    option: str = "subjects",
) -> list[Found]:
    """Where each subject's tokens are in the context that `reader.encode([prompt], t5_length, chunks)` gives.

    A phrase is looked for in each encoder's own text, its brackets taken away where they are weights; encoders whose
    text has it give its columns, which both CLIPs share. A T5 that does not run gives none.

    Raises SettingsError, which begins with the option's name, for a phrase that no text has, or not as often; one that
    is cut off; and a reader that is no TextEncoder. Raises TokenizerError for a prompt that is not valid Unicode.
    """
    from text_encoders.conditioning import TextEncoder, as_prompt  # here: mistakes in a list answer without PyTorch

    if not isinstance(reader, TextEncoder):
        raise SettingsError(f"{option}: the model's variant reads texts in a way of its own")
    encoders = [*reader.clips, *(["t5"] if reader.t5_mode == "on" else [])]
    reads = {encoder: reader.read(encoder, [as_prompt(prompt)])[0] for encoder in encoders}
    length = reader.t5_length if t5_length is None else t5_length
    return [_find(reader, reads, subject, length, chunks, option) for subject in subjects]


def apart(found: Sequence[Found], option: str = "subjects") -> None:
    """Raise SettingsError, which begins with the option's name, where two subjects have a token in common."""
    for one, other in itertools.combinations(found, 2):
        if {*one.columns} & {*other.columns}:
            raise SettingsError(
                f'{option}: "{one.phrase:.60}" and "{other.phrase:.60}" have tokens in common: '
                "expected subjects that lie apart"
            )


def _find(
    reader: TextEncoder, reads: Mapping[str, Read], subject: Subject, t5_length: int, chunks: int, option: str
) -> Found:
    columns, pieces, cut, most = set[int](), dict[str, list[str]](), list[str](), 0
    for encoder, read in reads.items():
        spans = occurrences(read.text, subject.phrase)
        most = max(most, len(spans))
        for begin, end in spans[subject.which - 1 : subject.which]:
            tokens = dict(_pieces(read, begin, end))
            places = [reader.column(encoder, token, t5_length, chunks) for token in tokens]
            columns |= {place for place in places if place is not None}
            pieces |= {encoder: [*tokens.values()]} if tokens else {}
            cut += [NAMES[encoder]] if None in places else []
    name, phrase = f'{option}: "{subject.name:.60}"', f'"{subject.phrase:.60}"'
    if not most:
        raise SettingsError(f"{name} is not in the prompt, where it has to be a word, or words, of its own")
    if most < subject.which:
        raise SettingsError(f"{name}: the prompt has {phrase} {'once' if most == 1 else f'{most} times'}")
    if cut:
        raise SettingsError(f"{name} is cut off for {' and '.join(cut)}: --long-prompts reads all of it")
    if not columns:
        raise SettingsError(f"{name}: the tokenizers leave it out")
    return Found(subject.name, tuple(sorted(columns)), pieces)


def _pieces(read: Read, begin: int, end: int) -> Iterator[tuple[int, str]]:
    """Tokens that have characters in a span of the text, with what each stands for."""
    for token, (first, last) in enumerate(read.spans):
        # No phrase begins or ends with a blank, so the blanks that some of T5's tokens take decide nothing.
        if max(first, begin) < min(last, end):
            yield token, read.text[first:last].strip()


def _folded(text: str) -> tuple[str, list[int]]:
    """The text as it is compared, and the character of the text that each of its characters comes from."""
    folded, places = list[str](), list[int]()
    for at, character in enumerate(text):
        if character.isspace():
            if text[at - 1 : at].isspace():
                continue
            character = " "
        decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFD", character).casefold())
        folded.append(decomposed)
        places += [at] * len(decomposed)
    return "".join(folded), places


def _in_word(character: str) -> bool:
    """Whether it goes on a word: a letter, digit or accent, but none of Chinese, Japanese or Korean; "" is none."""
    if not character or unicodedata.east_asian_width(character) == "W":
        return False
    return character.isalnum() or unicodedata.category(character).startswith("M")
