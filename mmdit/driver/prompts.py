"""A list of pictures: the file that it is read from, and which of its pictures are there already."""

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.common.errors import SettingsError
from mmdit.common.jsons import parse_json
from mmdit.common.options import Mark, marked
from mmdit.common.paths import user_path
from mmdit.driver.output import check_writable, is_file, names, picture_path, settings_in, stem
from mmdit.driver.pictures import check_pictures
from mmdit.driver.settings import Settings, alone, identity, keywords, settings_from

ERROR = "error"  # of a line in a list of failures
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


class Line(NamedTuple):
    """What one line of a list says."""

    where: str  # file and line, for messages
    settings: Settings


def read_prompts(path: str | Path, base: Settings) -> list[Line]:
    """The lines of a list, each a prompt or, in JSON lines, an object of settings; blank lines count for nothing.

    It is JSON lines where its name ends in .jsonl, .ndjson or .json, or its first line begins with a brace. base: has
    what a line does not say. Raises SettingsError, which names file and line, for what is no UTF-8, no JSON or no
    setting of a picture, for what no model could do, and for `out` that cannot be written or is another line's.
    """
    texts = read_lines(user_path("prompts", str(path)))
    if not texts:
        raise SettingsError(f"{path}: there is no prompt in it")
    first = next(iter(texts.values()))
    in_json = Path(path).suffix.lower() in JSON_ENDINGS or first.startswith("{")
    lines, folders, files = [], set(), {}
    for number, text in texts.items():
        line = Line(f"{path}: line {number}", base)
        with told_at(line):
            settings = picture_settings(from_json(text) if in_json else {"prompt": text}, base)
            settings.resolved({})
            check_pictures(settings)
            if settings.out not in folders:
                check_writable(settings)
                folders.add(settings.out)
            for i in range(settings.count) if is_file(settings.out) else ():
                file = picture_path(settings, i, settings.count)
                other = files.setdefault(os.path.realpath(file), line._replace(settings=settings))
                if other.settings != settings:
                    raise SettingsError(f"out: {file} is also where {other.where.removeprefix(f'{path}: ')} goes")
            lines.append(line._replace(settings=settings))
    return lines


@contextmanager
def told_at(line: Line) -> Iterator[None]:
    """Put file and line before the message of what is wrong with it."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{line.where}: {error}") from None


def read_lines(path: Path) -> dict[int, str]:
    """The lines that are not blank by their numbers, without the space around them; SettingsError."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SettingsError(f"prompts: {path}: {error.strerror or error}") from None
    lines = {}
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", data), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise SettingsError(f"{path}: line {number}: is not UTF-8") from None
        if "\0" in text:
            raise SettingsError(f"{path}: line {number}: has a character of no meaning, NUL: is the file UTF-8?")
        if text:
            lines[number] = text
    return lines


def from_json(text: str) -> dict[str, Any]:
    """The object that a line of JSON holds; SettingsError."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise SettingsError(
            f"is not JSON: {error} (a list whose name ends in .jsonl or that begins with {{ is JSON lines)"
        ) from None
    if not isinstance(value, dict):
        raise SettingsError('expected an object such as {"prompt": "a horse", "seed": 1}')
    return value


def picture_settings(given: dict[str, Any], base: Settings) -> Settings:
    """`base` with what a line says; SettingsError for what is not a picture's own.

    Why a picture was given up, which a list of failures says, counts for nothing.
    """
    loaded, of_the_run, own = marked(base, Mark.LOADED), marked(base, Mark.OF_THE_RUN), _own(base)
    for name in given:
        if name in loaded:
            raise SettingsError(f"{name} is fixed when the model is loaded, for all lines: give it as an option")
        if name in of_the_run:
            raise SettingsError(f"{name} belongs to the whole run: give it as an option; a line has {', '.join(own)}")
    settings = settings_from({name: value for name, value in given.items() if name != ERROR}, base)
    if "prompt" not in given:
        raise SettingsError("has no prompt")
    return settings


def line_of(settings: Settings, out: str) -> dict[str, Any]:
    """The line of a list that asks for this one picture; out: where pictures go without being told."""
    plain = {f.name: f.default for f in fields(settings)} | {"out": out}
    told = {name: getattr(settings, name) for name in _own(settings)}
    return {name: value for name, value in told.items() if name == "prompt" or value != plain[name]}


def _own(settings: Settings) -> list[str]:
    """The names that a line may have."""
    others = {*marked(settings, Mark.LOADED), *marked(settings, Mark.OF_THE_RUN)}
    return [name for name in keywords(settings) if name not in others]


# ---- what is there already -----------------------------------------------------------------------


class Folders:
    """The folders that pictures go to: what was drawn into them before, and what is going to be."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, list[Path]]] = {}  # by folder and by stem
        self._drawn: dict[str, object] = {}  # what a picture shows, by its file, however that is spelled
        self._promised: set[object] = set()

    def missing(self, wanted: Iterable[Settings]) -> list[tuple[Settings, Path]]:
        """Of the pictures, `count` for each entry, those that are not there, each once, with the files they go to."""
        return [(s, path) for s, path in self.placed(wanted) if path is not None]

    def placed(self, wanted: Iterable[Settings]) -> list[tuple[Settings, Path | None]]:
        """All of the pictures, in order, with the files they go to; None for those that are there, or come before.

        Whatever part of a list is there already, the rest gets the names that it had at the beginning.
        """
        pictures = [(s, i, some.count) for some in wanted for i, s in enumerate(alone(some))]
        places: dict[int, Path] = {}
        for k in sorted(range(len(pictures)), key=lambda k: not is_file(pictures[k][0].out)):  # fixed names first
            path = self.place(*pictures[k])
            places |= {} if path is None else {k: path}
        return [(s, places.get(k)) for k, (s, _, _) in enumerate(pictures)]

    def place(self, settings: Settings, index: int = 0, count: int = 1) -> Path | None:
        """The file for picture `index` of `count`; None where the same picture is there, or was given a place before.

        settings: of this picture alone, all defaults filled in. A file that shows another picture keeps its place
        in a folder; where `out` names the file, it is going to be replaced.
        """
        shown = identity(settings)
        if is_file(settings.out):
            path = picture_path(settings, index, count)
            return None if self._shown(path) == shown else self._promise(path, shown)
        folder = os.path.realpath(os.path.expanduser(settings.out))
        if (folder, shown) in self._promised or any(
            self._shown(p) == shown for p in self._like(folder, stem(settings))
        ):
            return None
        self._promised.add((folder, shown))
        for path in names(settings):
            if path not in self:
                if not path.exists():
                    return self._promise(path, shown)
                if self._shown(path) == shown:  # another process wrote it since the folder was looked at
                    return None
        raise AssertionError("names have no end")

    def __contains__(self, path: object) -> bool:
        """Whether something is going to be in this file, or was looked at there."""
        return os.path.realpath(str(path)) in self._drawn

    def _promise(self, path: Path, shown: object) -> Path:
        self._drawn[os.path.realpath(path)] = shown
        return path

    def _shown(self, path: Path) -> object:
        real = os.path.realpath(path)
        if real not in self._drawn and path.exists():
            settings = settings_in(path)
            self._drawn[real] = settings and identity(settings)
        return self._drawn.get(real)

    def _like(self, folder: str, wanted: str) -> list[Path]:
        """The files that bear this name, with or without a number."""
        if folder not in self._files:
            files = self._files[folder] = {}
            for path in sorted(Path(folder).glob("*.png")):
                for name in {path.stem, re.sub(r"-\d+$", "", path.stem)}:
                    files.setdefault(name, []).append(path)
        return self._files[folder].get(wanted, [])
