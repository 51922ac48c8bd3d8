"""The settings of a picture: the options of all rooms together, for command line, Python and metadata alike."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, check_options, marked, shown
from mmdit.common.paths import split_scale
from mmdit.config import MMDiTConfig
from mmdit.control.options import ControlOptions
from mmdit.driver.likeness import filled
from mmdit.driver.options import (
    FocusOptions,
    LikeOptions,
    ModelOptions,
    OutputOptions,
    PictureOptions,
    WatchOptions,
)
from mmdit.images.options import ImageOptions, as_text
from mmdit.memory.options import MemoryOptions
from mmdit.options import ComputeOptions
from mmdit.parallel.options import ManyOptions, ParallelOptions
from samplers.options import GuidanceOptions, SamplerOptions
from text_encoders.options import TextOptions
from vae.options import TinyOptions


# A dataclass has the fields of its last base first: read from below, this is the order of --help.
@dataclass(frozen=True)
class Settings(
    OutputOptions,
    WatchOptions,
    ManyOptions,
    ParallelOptions,
    MemoryOptions,
    ComputeOptions,
    TinyOptions,
    ModelOptions,
    TextOptions,
    LikeOptions,
    FocusOptions,
    GuidanceOptions,
    SamplerOptions,
    ControlOptions,
    ImageOptions,
    PictureOptions,
):
    """Everything a picture depends on, and where it goes. None stands for the model's own default."""

    def __post_init__(self) -> None:
        for name in _several(type(self)):
            given: Any = getattr(self, name) or ()
            if not isinstance(given, tuple | list) and isinstance(as_text(name, given), str | int | float):
                given = (given,)
            if isinstance(given, tuple | list):  # else it is refused by `check`
                given = tuple(as_text(name, one) for one in given)
            object.__setattr__(self, name, given)
        for name in marked(self, Mark.PICTURE):
            if name not in _several(type(self)):
                object.__setattr__(self, name, as_text(name, getattr(self, name)))

    def resolved(self, defaults: dict[str, Any]) -> "Settings":
        """With the model's `defaults`, then SD3.5-Medium's, in place of None; the result is checked.

        Raises SettingsError.
        """
        known, told = {**SD35_MEDIUM_DEFAULTS, **defaults}, self.written()
        missing = {name: value for name, value in known.items() if getattr(told, name) is None}
        settings = replace(told, **missing)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise SettingsError for what no model could do."""
        check_options(self)


@cache
def _several(options: type) -> tuple[str, ...]:
    """Names of the fields that hold one or several texts."""
    return tuple(f.name for f in fields(options) if isinstance(f.default, tuple))


LOADED = marked(Settings, Mark.LOADED)
SD35_MEDIUM_DEFAULTS = {f.name: usual for f in fields(Settings) if (usual := f.metadata["usual"]) is not None}


def alone(settings: Settings) -> list[Settings]:
    """The settings of each of its `count` pictures."""
    if settings.count == 1:
        return [settings]
    variation = settings.variation_seed
    if variation is not None:  # of one picture
        return [replace(settings, variation_seed=variation + i, count=1) for i in range(settings.count)]
    return [replace(settings, seed=settings.seed + i, count=1) for i in range(settings.count)]


def identity(settings: Settings) -> object:
    """What two settings have in common that draw the same picture, but for rounding; hashable.

    Files count by what is in them (`weights`), not by where they lie; a scale behind a path counts.
    """
    by_content = bool(settings.weights)
    names, paths = _seen(type(settings), by_content)
    texts = {name: value for name in paths if isinstance(value := getattr(settings, name), tuple)}
    scales = tuple((name, tuple(split_scale(text)[1] for text in value)) for name, value in texts.items())
    return by_content, tuple(getattr(settings, name) for name in names), scales


@cache
def _seen(options: type, by_content: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the fields that change a picture; of those that then do not, since the content of files counts."""
    unseen, paths = marked(options, Mark.NOT_SEEN), marked(options, Mark.PATH) if by_content else ()
    return tuple(f.name for f in fields(options) if f.name not in (*unseen, *paths)), paths


def check_defaults(defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """A model's own defaults, as its folder brings them; raises SettingsError for what may not be there."""
    for name, value in defaults.items():
        if name not in SD35_MEDIUM_DEFAULTS or isinstance(value, bool) or not isinstance(value, int | float):
            allowed = ", ".join(SD35_MEDIUM_DEFAULTS)
            raise SettingsError(
                f"{where}: {name!r:.60}: {value!r:.60} is not a default: expected numbers for {allowed}"
            )
    try:
        Settings().resolved(defaults)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    return defaults


def check_size(settings: Settings, config: MMDiTConfig, downscale: int) -> None:
    """Raise SettingsError where a side, if given, is not made of whole patches or leaves the table of positions.

    downscale: picture pixels per latent cell along a side.
    """
    multiple = config.patch_size * downscale
    largest = math.inf if config.largest is None else config.largest * multiple
    for name in ("width", "height"):
        side = getattr(settings, name)
        if side is None:
            continue
        if side > largest:
            raise SettingsError(
                f"{name} {shown(side)} is more than the model's table of positions allows: {largest} at most"
            )
        if side % multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            nearest = " or ".join(str(s) for s in (below, above) if 0 < s <= largest)
            raise SettingsError(f"{name} {side} is not a multiple of {multiple}: the nearest are {nearest}")


def keywords(options: Any) -> list[str]:
    """The names that a user may give."""
    return [f.name for f in fields(options) if Mark.FOUND not in f.metadata["marks"]]


def settings_from(given: dict[str, Any], base: Settings = Settings()) -> Settings:
    """`base` with Python keywords in place; SettingsError for an unknown one, with the name that may be meant."""
    names = keywords(base)
    for name in given:
        if name not in names:
            begun = [known for known in names if name.startswith(f"{known}_")]  # as `negative_prompt`
            close = begun or difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise SettingsError(f"no setting {name!r}: {hint}")
    return replace(base, **filled(given, vars(base)))
