"""From a request to pictures: which settings it may name, and whatever becomes of them on the event loop.

No request names a file of this machine: settings that are paths are not among those it may name, pictures come as data.
"""

import asyncio
import difflib
from base64 import b64decode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, kind, marked, of_each, shown, whole, wrong
from mmdit.driver.foreign import number
from mmdit.driver.options import OF_THE_COMMAND
from mmdit.driver.pictures import result_size
from mmdit.driver.settings import Settings, alone, settings_from
from mmdit.images.given import Given
from mmdit.images.read import picture_in, read_picture
from mmdit.serve.events import Drawn, Ended, Event, LetGoError, Stepped
from mmdit.serve.keys import ANYONE, Client
from mmdit.serve.metrics import Metrics
from mmdit.serve.options import ServeOptions
from mmdit.serve.studio import Studio
from text_encoders.subjects import subjects_of

_CHARACTERS = 32_000  # of a text
_PIXELS = 25_000_000  # of a picture that is sent
_TEXTS = 8  # of `also`, each of which is evaluated at every step; of `attention_maps`, each of which is kept

_ITS_OWN = {*OF_THE_COMMAND, "attention", "count"}
_NOT_A_PICTURES = {Mark.LOADED, Mark.OF_THE_RUN, Mark.FOUND}

PICTURES = marked(Settings, Mark.PICTURE)
NAMES = tuple(
    f.name
    for f in fields(Settings)
    if not _NOT_A_PICTURES & {*f.metadata["marks"]}
    and (Mark.PATH not in f.metadata["marks"] or f.name in PICTURES)
    and f.name not in _ITS_OWN
)
Look = Callable[[Stepped], Any]


# ---- settings ------------------------------------------------------------------------------------


def check_name(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise SettingsError for a name that is none of those known, with the one that may be meant."""
    if name in known:
        return
    if any(f.name == name for f in fields(Settings)):
        raise SettingsError(f"{name} is the server's, no setting of a request")
    close = difflib.get_close_matches(name[:100], [*known], n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise SettingsError(f"no setting {name[:100]!r}: {hint}")


def from_text(name: str, text: Any) -> Any:
    """A form's field as a value of the setting of this name; texts that are none stay, for its check to refuse."""
    if not isinstance(text, str):
        return text
    of = of_each(Settings, name)
    if of is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    value = number(text) if of in (int, float) else None
    return text if value is None else value


def decoded(name: str, data: Any) -> bytes:
    """The bytes that a request gives, as they are or as base64 with or without `data:...,` before it; SettingsError."""
    if isinstance(data, str):
        head, comma, body = data.partition(",") if data[:5] == "data:" else ("", "", data)
        if head and not (comma and head.endswith(";base64")):
            raise SettingsError(f"{name}: a data URL without base64: expected data:image/png;base64,...")
        try:
            data = b64decode("".join(body.split()), validate=True)
        except ValueError:
            raise SettingsError(
                f"{name}: is no base64: expected the picture itself; addresses and files are not read"
            ) from None
    if not isinstance(data, bytes) or not data:
        raise SettingsError(f"{name}: expected a picture: PNG, JPEG or WebP, as base64 or as a file of the form")
    return data


def picture(name: str, data: Any) -> Image.Image:
    """The picture that a request gives, as it is stored; SettingsError."""
    return picture_in(name, decoded(name, data), _PIXELS)


def as_setting(name: str, image: Image.Image) -> Given:
    """A picture as the value of a setting: RGB, upright."""
    return Given(read_picture(name, Given(image)))


def written_levels(value: Any) -> str:
    """`sigmas` as numbers, never as a file of them; SettingsError."""
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    levels: list[float] = []
    for part in parts if isinstance(parts, list) else ():
        level = number(part) if isinstance(part, str) else part
        if isinstance(level, bool) or not isinstance(level, int | float) or not abs(level) <= 2:
            raise wrong("sigmas", value, "falling numbers, as in 1,0.6,0.2")
        levels.append(float(level))
    if not levels:
        raise wrong("sigmas", value, "falling numbers, as in 1,0.6,0.2")
    return ",".join(map(repr, levels))


def settings_for(given: Mapping[str, Any], base: Settings) -> Settings:
    """What a request asks for, by the names of NAMES, its pictures as `Given`; SettingsError.

    base: what loading fixed.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        check_name(name, NAMES)
        if name in PICTURES:
            several = isinstance(value, list | tuple)
            images = [v if isinstance(v, Given) else as_setting(name, picture(name, v)) for v in _each(value)]
            value = tuple(images) if several or kind(Settings, name) is tuple else images[0]
        elif name == "sigmas":
            value = written_levels(value)
        for one in _each(value):
            if isinstance(one, str) and len(one) > _CHARACTERS:
                raise SettingsError(f"{name} has {len(one)} characters: expected at most {_CHARACTERS}")
        found[name] = tuple(value) if isinstance(value, list) and kind(Settings, name) is tuple else value
    also = found.get("also", ())
    if isinstance(also, tuple) and len(also) > _TEXTS:
        raise SettingsError(f"also has {len(also)} texts: expected at most {_TEXTS}")
    words = found.get("attention_maps")
    if isinstance(words, str) and (count := len(subjects_of(words, "attention_maps"))) > _TEXTS:
        raise SettingsError(f"attention_maps has {count} subjects: expected at most {_TEXTS}")
    return settings_from(found, base)


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- a request -----------------------------------------------------------------------------------


@dataclass
class Front:
    """What the routes have in common."""

    options: ServeOptions
    studio: Studio
    metrics: Metrics

    def checked(self, given: Mapping[str, Any], count: int) -> list[Settings]:
        """So many pictures, each ready to be drawn; raises SettingsError, or ClosedError where there is no model yet.

        Takes a while: for a thread.
        """
        pipe, most = self.studio.pipeline, self.options
        asked = settings_for(given, most.settings)
        if not whole(count) or not 1 <= count <= most.most_pictures:
            raise SettingsError(f"count is {shown(count)}: expected 1 to {most.most_pictures} pictures")
        self._check_limits(asked)
        settings = pipe.check(replace(asked, count=count))
        self._check_limits(settings)
        return alone(settings)

    def _check_limits(self, s: Settings) -> None:
        """Of settings, filled in or not."""
        most = self.options
        if isinstance(s.steps, int) and s.steps > most.most_steps:
            raise SettingsError(f"steps is {shown(s.steps)}: expected at most {most.most_steps}")
        sides = {"width": s.width, "height": s.height}
        with suppress(TypeError, ValueError, OverflowError):  # values that `check` refuses
            sides["the result's width"], sides["the result's height"] = result_size(s)
        for name, side in sides.items():
            if isinstance(side, int) and side > most.most_side:
                raise SettingsError(f"{name} is {shown(side)}: expected at most {most.most_side}")

    def told(self) -> dict[str, Any]:
        """What whoever asks may want to know before: the model's defaults, and what a request may be."""
        most = self.options
        limits = {"side": most.most_side, "steps": most.most_steps, "pictures": most.most_pictures}
        if not self.studio.loaded:
            return {"limits": limits}
        pipe = self.studio.pipeline_owned
        config = pipe.transformer.config
        limits["multiple"] = multiple = config.patch_size * pipe.vae.config.downscale
        if config.largest is not None:
            limits["side"] = min(most.most_side, config.largest * multiple)
        return {"defaults": dict(pipe.defaults), "limits": limits}

    async def ask(self, request: Request, given: Mapping[str, Any], count: int, look: Look | None = None) -> "Asked":
        """Have a request's pictures drawn; raises what `checked` and `Studio.submit` do."""
        client: Client = request.scope.get("client_of_key", ANYONE)
        pictures = await run_in_threadpool(self.checked, given, count)
        return Asked(self, request, pictures, client, look)


@dataclass(frozen=True)
class Looked:
    """What `look` made of a step."""

    event: Stepped
    seen: Any


class Asked:
    """Pictures that are drawn for a request, as the event loop sees it; used as a context, whose end lets go."""

    def __init__(
        self, front: Front, request: Request, pictures: list[Settings], client: Client, look: Look | None
    ) -> None:
        """look: called for each step in the thread that draws; what it gives, if not None, comes as `Looked`."""
        self.pictures, self._request, self._look = pictures, request, look
        self.log: dict[str, Any] = request.scope.setdefault("log", {})
        self.log["pictures"] = len(pictures)
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self._until = self._loop.time() + front.options.timeout
        address = request.client.host if request.client else ""
        whose = address if client is ANYONE else client.name  # who takes turns with others
        self.ticket = front.studio.submit(pictures, self._told, client.name, client.most, whose)
        self._leaving: asyncio.Task[None] | None = None

    def _told(self, event: Event) -> None:
        """In any thread."""
        told: Any = event
        if isinstance(event, Stepped):
            seen = None if self._look is None else self._look(event)
            if seen is None:
                return
            told = Looked(event, seen)
        self._loop.call_soon_threadsafe(self._events.put_nowait, told)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self.ticket.cancel("left")
        self.log["together"] = max(place.together for place in self.ticket.places)

    async def _left(self) -> None:
        """Wait for the client to leave. Not for streams: there Starlette does."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.ticket.cancel("left")

    async def next(self, patience: float | None = None) -> Drawn | Looked | Ended | None:
        """What comes next; None where nothing came for so many seconds.

        Raises what the ticket ended with, or TimeoutError where the request is too old.
        """
        left = self._until - self._loop.time()
        try:
            event = await asyncio.wait_for(self._events.get(), max(0, min(left, patience or left)))
        except TimeoutError:
            if self._loop.time() < self._until:
                return None
            self.ticket.cancel("timeout")
            raise
        if isinstance(event, Ended) and event.error is not None:
            raise event.error
        return event

    async def all(self, partly: str = "") -> list[Drawn]:
        """What is drawn, in order. partly: where it was cancelled for this reason, what was drawn until then."""
        self._leaving = asyncio.create_task(self._left())
        drawn: list[Drawn] = []
        try:
            while not isinstance(event := await self.next(), Ended):
                if isinstance(event, Drawn):
                    drawn.append(event)
        except LetGoError as error:
            if not partly or str(error) != partly:
                raise
        return sorted(drawn, key=lambda one: one.index)
