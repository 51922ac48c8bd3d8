"""The interface of OpenAI's images, as its client package (`openai`, 3.57) speaks it.

This engine's settings stand beside the client's own fields, under their names or the usual ones. What is no field is
refused, with the name that may be meant.
"""

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mmdit.common.errors import SettingsError
from mmdit.common.jsons import parse_json
from mmdit.common.options import kind, whole, wrong
from mmdit.driver.settings import Settings
from mmdit.images.given import Given
from mmdit.serve.asking import NAMES, Asked, Front, Looked, as_setting, check_name, from_text, picture
from mmdit.serve.events import Drawn, Ended, Stepped
from mmdit.serve.replies import FORMATS, RefusedError, Trouble, base64_of, model_name, trouble
from mmdit.serve.words import base64_of_maps

_ALIASES = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg",
    "max_sequence_length": "t5_length",
}
_WITHOUT_EFFECT = {
    "model", "quality", "style", "user", "moderation", "safety_identifier", "input_fidelity", "complexity",
}  # fmt: skip
_OWN = {
    "n", "size", "response_format", "output_format", "output_compression", "background", "stream", "partial_images",
}  # fmt: skip
_ALIVE = 15  # seconds after which a stream that has nothing to tell says that it is there
_MOST_PARTIAL = 16  # the client's own are 3 at most
_UNSENT = 3  # partial pictures of a picture that wait for a client that reads slowly

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(told: Trouble) -> dict[str, Any]:
    """An error in the client's shape."""
    of = _KINDS.get(told.status, "invalid_request_error" if told.status < 500 else "server_error")
    return {"error": {"message": told.message, "type": of, "param": told.param, "code": told.code}}


@dataclass
class Wish:
    """What a request says."""

    given: dict[str, Any] = field(default_factory=dict)  # settings of this engine
    own: dict[str, Any] = field(default_factory=dict)  # the interface's fields

    @property
    def form(self) -> str:
        form = self.own.get("output_format", "png")
        form = "jpeg" if form == "jpg" else form
        if form not in FORMATS:
            raise wrong("output_format", form, f"one of {', '.join(FORMATS)}")
        return form

    @property
    def count(self) -> Any:
        return self.own.get("n", 1)

    def whole(self, name: str, usual: int, most: int) -> int:
        value = self.own.get(name, usual)
        if not whole(value) or not 0 <= value <= most:
            raise wrong(name, value, f"a whole number from 0 to {most}")
        return value

    def check(self) -> None:
        """Raise SettingsError for what the interface's fields cannot be."""
        _ = self.form
        self.whole("output_compression", 100, 100)
        self.whole("partial_images", 0, _MOST_PARTIAL)
        if not isinstance(self.own.get("stream", False), bool):
            raise wrong("stream", self.own["stream"], "true or false")
        expected = {"response_format": ("b64_json", "url"), "background": ("auto", "opaque")}
        for name, choices in expected.items():
            if self.own.get(name, choices[0]) not in choices:
                raise wrong(name, self.own[name], f"one of {', '.join(choices)}")


def wish_of(said: Mapping[str, Any], pictures: Mapping[str, Given]) -> Wish:
    """The fields of a request. pictures: those that the interface itself has. Raises SettingsError."""
    wish = Wish(dict(pictures))
    known = (*NAMES, *_ALIASES, *_OWN, *_WITHOUT_EFFECT)
    for name, value in said.items():
        check_name(name, known)
        if value is None or name in _WITHOUT_EFFECT:
            continue
        setting = _ALIASES.get(name, name)
        if name in _OWN:
            wish.own[name] = value
        elif setting in wish.given:
            raise SettingsError(f"{name} is given twice")
        else:
            wish.given[setting] = value
    _read_size(wish)
    wish.check()
    if "seed" not in wish.given:
        wish.given["seed"] = secrets.randbelow(2**32)
    return wish


def _read_size(wish: Wish) -> None:
    size = wish.own.get("size", "auto")
    if size == "auto":
        return
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size) if isinstance(size, str) else None
    if match is None:
        raise wrong("size", size, "auto or WIDTHxHEIGHT in pixels, as in 1024x1024")
    if wish.given.keys() & {"width", "height"}:
        raise SettingsError(f"size is {size}, but width or height is given too: expected one of them")
    wish.given |= {"width": int(match[1]), "height": int(match[2])}


def free_where_clear(data: Any) -> Given:
    """A mask as this interface has it, transparent where the picture is painted anew."""
    mask = picture("mask", data)
    if mask.mode not in ("RGBA", "LA", "PA") and "transparency" not in mask.info:
        raise SettingsError("mask: has no transparency: expected a PNG that is transparent where to paint anew")
    return as_setting("mask", ImageChops.invert(mask.convert("RGBA").getchannel("A")))


def steps_of_partial(steps: int, partial: int) -> list[int]:
    """After which of so many steps, from 1, a partial picture is sent; fewer where there are not so many steps."""
    return sorted({step for i in range(partial) if 0 < (step := round(steps * (i + 1) / (partial + 1))) < steps})


class Stream(StreamingResponse):
    """Events of a request, whose pictures are let go where the client leaves."""

    def __init__(self, asked: Asked, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._asked:
            await super().__call__(scope, receive, send)


class OpenAI:
    """The routes under /v1."""

    def __init__(self, front: Front) -> None:
        self._front, self._since = front, int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/images/variations", self.variations, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
        ]

    # ---- requests --------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Response:
        try:
            said = await run_in_threadpool(parse_json, await request.body())
        except ValueError as error:
            raise RefusedError(400, f"the body is no JSON: {error}", "invalid_json") from None
        if not isinstance(said, dict):
            raise RefusedError(400, "the body is no JSON object", "invalid_json")
        if said.get("prompt") is None:
            raise RefusedError(400, "prompt is missing", "missing", "prompt")
        return await self._answer(request, said, {}, "image_generation")

    async def edits(self, request: Request) -> Response:
        said, files = await self._form(request)
        if said.get("prompt") is None:
            raise RefusedError(400, "prompt is missing", "missing", "prompt")
        pictures = await run_in_threadpool(self._pictures, files)
        return await self._answer(request, said, pictures, "image_edit")

    async def variations(self, request: Request) -> Response:
        said, files = await self._form(request)
        pictures = await run_in_threadpool(self._pictures, files)
        return await self._answer(request, said, pictures, "image_edit")

    async def _form(self, request: Request) -> tuple[dict[str, Any], dict[str, list[bytes | str]]]:
        """A form's fields as settings have them, and its pictures."""
        said: dict[str, Any] = {}
        files: dict[str, list[bytes | str]] = {}
        size = self._front.options.most_megabytes * 10**6
        async with request.form(max_files=100, max_fields=1000, max_part_size=size) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in ("image", "mask") or isinstance(value, UploadFile):
                    data = await value.read() if isinstance(value, UploadFile) else value
                    files.setdefault("init" if name == "image" else name, []).append(data)
                    continue
                setting = _ALIASES.get(name, name)
                if setting in NAMES:
                    one = from_text(setting, value)
                    several = kind(Settings, setting) is tuple
                    said[name] = (*said.get(name, ()), one) if several else one
                else:
                    said[name] = _plain(value)
        return said, files

    def _pictures(self, files: Mapping[str, list[bytes | str]]) -> dict[str, Any]:
        if len(files.get("init", ())) != 1:
            count = len(files.get("init", ()))
            raise RefusedError(400, f"image is there {count} times: expected one picture", "invalid_value", "image")
        found: dict[str, Any] = {}
        for name, every in files.items():
            check_name(name, NAMES)
            if name == "mask":
                found[name] = free_where_clear(every[0])
            else:
                some = [as_setting(name, picture("image" if name == "init" else name, data)) for data in every]
                found[name] = some if kind(Settings, name) is tuple else some[0]
        return found

    # ---- answers ---------------------------------------------------------------------------------

    async def _answer(
        self, request: Request, said: Mapping[str, Any], pictures: Mapping[str, Any], event: str
    ) -> Response:
        wish = wish_of(said, pictures)
        if wish.own.get("stream"):
            partial = wish.whole("partial_images", 0, _MOST_PARTIAL)
            made, sent = dict[int, int](), dict[int, int]()  # of each picture; each is counted in one thread

            def look(at: Stepped) -> tuple[Image.Image | None]:
                waiting = made.get(at.index, 0) - sent.get(at.index, 0)
                if at.step not in steps_of_partial(at.steps, partial) or waiting >= _UNSENT:
                    return (None,)
                made[at.index] = made.get(at.index, 0) + 1
                return (at.look(),)

            asked = await self._front.ask(request, wish.given, wish.count, look)
            return Stream(asked, self._stream(asked, wish, event, sent))
        async with await self._front.ask(request, wish.given, wish.count) as asked:
            drawn = await asked.all()
        data = [await self._told(one, wish) for one in drawn]
        return JSONResponse({"created": int(time.time()), "data": data, **self._common(wish, drawn[0].image)})

    async def _told(self, one: Drawn, wish: Wish) -> dict[str, Any]:
        quality = wish.whole("output_compression", 100, 100)
        text = await run_in_threadpool(base64_of, one.image, one.settings, wish.form, quality)
        name, value = "b64_json", text
        if wish.own.get("response_format") == "url":
            name, value = "url", f"data:image/{wish.form};base64,{text}"
        maps = {"attention_maps": base64_of_maps(one.maps)} if one.maps else {}
        return {name: value, "seed": one.settings.seed, **maps}

    def _common(self, wish: Wish, image: Image.Image) -> dict[str, Any]:
        return {
            "background": "opaque",
            "output_format": wish.form,
            "quality": "auto",
            "size": f"{image.width}x{image.height}",
        }

    async def _stream(self, asked: Asked, wish: Wish, kind: str, sent: dict[int, int]) -> AsyncIterator[str]:
        """Events, as the client reads them; it takes every kind but the last for a partial picture.

        sent: of each picture, counts the partial ones.
        """
        several = len(asked.pictures) > 1
        try:
            while not isinstance(event := await asked.next(_ALIVE), Ended):
                if event is None:
                    yield ": still there\n\n"
                    continue
                if isinstance(event, Looked):
                    index, image, last = event.event.index, event.seen[0], False
                    yield f": picture {index}: step {event.event.step} of {event.event.steps}\n\n"
                    if image is None:
                        continue
                    text = await run_in_threadpool(base64_of, image, None, wish.form, 100)
                    told = {"b64_json": text, "partial_image_index": sent.get(index, 0)}
                    sent[index] = sent.get(index, 0) + 1
                else:
                    index, image, last = event.index, event.image, True
                    told = await self._told(event, wish)
                    told["b64_json"] = told.get("b64_json") or told.pop("url").partition(",")[2]
                told |= {"created_at": int(time.time()), **self._common(wish, image)}
                told |= {"index": index} if several else {}
                yield _event({"type": f"{kind}.{'completed' if last else 'partial_image'}", **told})
        except Exception as error:
            asked.log["error"] = repr(error)
            yield _event(error_body(trouble(error)))

    # ---- models ----------------------------------------------------------------------------------

    @property
    def _model(self) -> dict[str, Any]:
        name = model_name(self._front.options.settings)
        known = {"id": name, "object": "model", "created": self._since, "owned_by": "mmdit"}
        return {**known, **self._front.told()}

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model["id"]:
            raise RefusedError(404, f"there is no model but {self._model['id']}", "model_not_found", "model")
        return JSONResponse(self._model)


def _plain(text: Any) -> Any:
    """A field of a form that is the interface's own: numbers and truth are written as text there."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if isinstance(text, str) and re.fullmatch("-?[0-9]{1,9}", text) else text


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
