"""JSON from strangers, bounded before and after it is parsed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmdit.common.errors import UserError

MAX_BYTES = 16_000_000  # of a file: a configuration, an index or a vocabulary
MAX_VALUES = 1_000_000  # in one text; the header of a published model has about 10,000
MAX_DEPTH = 20


def read_json(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` when it is unreadable, not JSON, or not an object."""
    if path.exists() and not path.is_file():
        raise error(f"{path}: not a regular file")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise error(f"{path}: {size} bytes of JSON, at most {MAX_BYTES} are read")
        raw = path.read_bytes()
    except OSError as failed:
        raise error(f"{path}: cannot be read: {failed.strerror}") from None
    try:
        value = parse_json(raw)
    except ValueError as failed:
        raise error(f"{path}: not valid JSON: {failed}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, UTF-8 where it is bytes; ValueError, its text on one line, for all that is wrong.

    Wrong are, too, a name twice in one object, NaN, infinity, and more values or depth than any published file has.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        # Every value but the outermost comes after one of these. Inside texts they count as well: all the earlier.
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):  # readers differ in which one counts
        raise ValueError(f"{_twice(name for name, _ in pairs)[:60]!r} is there twice")
    return result


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
