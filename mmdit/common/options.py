"""How an option is declared: once, as a field of a frozen dataclass beside the function that it belongs to.

    @dataclass(frozen=True)
    class SamplerOptions:
        "How the picture is denoised"      # the heading in --help

        steps: int | None = option(None, "denoising steps", usual=28, metavar="N", check=from_one)

`Settings` inherits from all such classes. The command line, the keywords of Python, the keys of a list's lines and the
metadata of a picture follow from the fields, and so does what a setting changes: without a mark it is taken to change
the picture, so that no other picture is taken for it and none is drawn together with it.
"""

import sys
from collections.abc import Callable
from dataclasses import Field, field, fields
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, NamedTuple, TypeGuard, get_args, get_origin, get_type_hints

from mmdit.common.errors import SettingsError


class Mark(Enum):
    """What is special about a setting."""

    LOADED = "is fixed when the model is loaded"
    OF_THE_RUN = "belongs to a whole run, not to one of its pictures"
    NOT_SEEN = "does not change the picture, but for rounding"
    OWN = "may differ between pictures that are drawn together"
    PATH = "names files; what they hold counts, not where they are"
    PICTURE = "names a picture's file; Python may give the picture itself"
    FOUND = "is no option: it is filled in when the model is loaded"


Check = Callable[[str, Any], object]  # of name and value; raises SettingsError


def option(
    default: Any,
    help: str,
    *marks: Mark,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    check: Check | None = None,
    usual: Any = None,
) -> Any:
    """A field that is a setting.

    check: called where the value is of the field's type. usual: SD3.5-Medium's value, where the default None stands
    for the model's own.
    """
    told = {"help": help, "marks": marks, "metavar": metavar, "choices": choices, "check": check, "usual": usual}
    return field(default=default, metadata=told)


def same(room: type, name: str) -> Any:
    """An option that is declared elsewhere already."""
    f = next(f for f in fields(room) if f.name == name)
    return field(default=f.default, metadata=f.metadata)


def marked(options: Any, mark: Mark) -> tuple[str, ...]:
    """Names of the fields, of a class or of one of its values, that have this mark."""
    return _marked(options if isinstance(options, type) else type(options), mark)


@cache
def _marked(options: type, mark: Mark) -> tuple[str, ...]:
    return tuple(f.name for f in fields(options) if mark in f.metadata["marks"])


def rooms(options: type) -> dict[str, list[Field]]:
    """{heading: fields} of each class that `options` inherits from, in the order of the fields."""
    found: dict[str, list[Field]] = {}
    for f in fields(options):
        room = next(c for c in options.__mro__ if f.name in vars(c).get("__annotations__", {}))
        found.setdefault((room.__doc__ or room.__name__).strip().splitlines()[0].rstrip("."), []).append(f)
    return found


@cache
def kind(options: type, name: str) -> type:
    """bool, int, float, str or tuple: what a field holds that is not None."""
    hint = _hints(options)[name]
    plain = next(t for t in (*get_args(hint), hint) if t is not NoneType) if get_origin(hint) is not tuple else hint
    return get_origin(plain) or plain


@cache
def of_each(options: type, name: str) -> type:
    """bool, int, float or str: what a field holds, or each of several values in it."""
    return get_args(_hints(options)[name])[0] if kind(options, name) is tuple else kind(options, name)


@cache
def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def check_options(settings: Any) -> None:
    """Raise SettingsError where a field has a value that is not of its type, none of its choices, or fails its check.

    A class may have a method `check_together`, for what depends on several of its fields; it is called thereafter.
    """
    for name, choices, check, of, several, may_lack in _checks(type(settings)):
        value = getattr(settings, name)
        if value is None and may_lack:
            continue
        if choices:
            if value not in choices:
                raise wrong(name, value, f"one of {', '.join(choices)}")
            continue
        for one in value if several and isinstance(value, tuple) else (value,):
            _TYPES[of](name, one)
            if check:
                check(name, one)
    for room in type(settings).__mro__:
        if "check_together" in vars(room):
            vars(room)["check_together"](settings)


class _Checked(NamedTuple):
    """How a field's value is checked."""

    name: str
    choices: tuple[str, ...]
    check: Check | None
    of: type
    several: bool
    may_lack: bool  # None passes


@cache
def _checks(options: type) -> list[_Checked]:
    """Of every field of a class: a list of many pictures asks for them at each."""
    hints, found = _hints(options), []
    for f in fields(options):
        told, several = f.metadata, kind(options, f.name) is tuple
        may_lack = NoneType in get_args(hints[f.name]) and told["usual"] is None
        of = of_each(options, f.name)
        found.append(_Checked(f.name, told["choices"], told["check"], of, several, may_lack))
    return found


def wrong(name: str, value: Any, expected: str) -> SettingsError:
    """The error for a value that is not what is expected."""
    return SettingsError(f"{name} is {shown(value)}: expected {expected}")


def shown(value: Any) -> str:
    """A value as it is written, if it is not too long for a line."""
    try:
        return f"{value!r:.200}"
    except ValueError:  # a whole number of thousands of digits
        return "a number too long to show"


# ---- checks ----------------------------------------------------------------------------------------


def whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def from_one(name: str, value: Any) -> None:
    if not whole(value) or value < 1:
        raise wrong(name, value, "a whole number from 1")


def from_one_to(most: int) -> Check:
    """The check for a whole number from 1 to this."""

    def check(name: str, value: Any) -> None:
        from_one(name, value)
        if value > most:
            raise wrong(name, value, f"at most {most}")

    return check


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise SettingsError(f"{name} is {value!a}: not valid Unicode")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")


def _check_whole(name: str, value: Any) -> None:
    if not whole(value):
        raise wrong(name, value, "a whole number")


def _check_number(name: str, value: Any) -> None:
    # Compared as they are: a whole number may be too long to become a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise wrong(name, value, "a number")


_TYPES: dict[type, Check] = {
    str: _check_text, bool: _check_bool, int: _check_whole, float: _check_number,
}  # fmt: skip
