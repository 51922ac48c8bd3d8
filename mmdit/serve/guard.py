"""What stands before every route: who may ask, how much, and a line in the log."""

import asyncio
import json
import secrets
import time
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmdit.common.command import say
from mmdit.serve import automatic, browser, openai
from mmdit.serve.keys import Keys
from mmdit.serve.metrics import Metrics
from mmdit.serve.options import ServeOptions, loopback
from mmdit.serve.replies import GONE, RefusedError, Trouble, trouble

_OPEN = {"/health", "/ready", *browser.FILES}  # without a key; the page asks for it
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_PATIENCE = 60  # seconds that a client may send nothing in the middle of a request
_AT_ONCE = 16  # of the largest bodies, in all that is being answered
_LONGEST = 200  # characters of an address in the log


class Guard:
    """An ASGI application around the routes: keys, origins, sizes, errors as each client reads them, the log."""

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        keys: Keys,
        metrics: Metrics,
        paths: frozenset[str],
        log: Callable[[str], object] = say,
    ) -> None:
        """paths: those of the routes; others are one in the metrics."""
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._paths, self._log = paths, log
        self._held = 0  # bytes of the bodies of requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", scope["type"]
        start, status = time.perf_counter(), GONE
        headers, path = Headers(scope=scope), scope["path"]
        log: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "method": scope["method"]}
        log |= {"id": secrets.token_hex(8), "bytes": 0}
        scope["log"], scope["app"] = log, self  # with an application routes raise what they answer otherwise
        allowed = headers.get("origin") is not None and headers["origin"] == self._options.origin

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = MutableHeaders(scope=message)
                more["x-content-type-options"], more["x-request-id"] = "nosniff", log["id"]
                if allowed:
                    more["access-control-allow-origin"], more["vary"] = headers["origin"], "origin"
            await send(message)

        try:
            try:
                answer = self._checked(scope, headers, allowed)
                await (answer or self._app)(scope, self._counted(log, headers, receive), sending)
            except ClientDisconnect:
                pass
            except Exception as error:
                told = trouble(_plain(error))
                if told.status != GONE:
                    self._note(log, told, error)
                if status == GONE and told.status != GONE:  # nothing was sent yet
                    body = (automatic if path.startswith("/sdapi/") else openai).error_body(told)
                    await JSONResponse(body, told.status, told.headers)(scope, receive, sending)
        finally:
            self._held -= log["bytes"]
            seconds, route = time.perf_counter() - start, path if path in self._paths else "other"
            self._metrics.add("mmdit_requests_total", route=route, status=str(status))
            self._metrics.observe("mmdit_request_seconds", seconds, route=route)
            log |= {"path": path[:_LONGEST], "status": status, "seconds": round(seconds, 4)}
            self._log(json.dumps(log))

    def _note(self, log: dict[str, Any], told: Trouble, error: Exception) -> None:
        log["error"] = told.code if told.status < 500 else told.message[:500]  # the first may show a prompt
        if told.code == "internal":  # a mistake of ours
            last = traceback.extract_tb(error.__traceback__)[-1]
            log["error"] = f"{error!r:.500} at {last.filename}:{last.lineno}"

    def _checked(self, scope: Scope, headers: Headers, allowed: bool) -> Response | None:
        """Raise RefusedError for whoever may not ask; the answer to a browser's question whether it may."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if loopback(self._options.host) and _name(host) not in {*_LOCAL, self._options.host}:
            raise RefusedError(403, f"host is {host[:100]!r}: expected localhost", "wrong_host")  # DNS rebinding
        if origin is not None and not allowed and _host(origin) != host:
            raise RefusedError(
                403, f"pages of {origin[:100]!r} are not let in: --origin names one that is", "wrong_origin"
            )
        if scope["method"] == "OPTIONS" and allowed:
            asked = headers.get("access-control-request-headers", "")
            told = {"access-control-allow-methods": "GET, POST", "access-control-allow-headers": asked[:1000]}
            return Response(status_code=204, headers={**told, "access-control-max-age": "600"})
        if scope["path"] not in _OPEN:
            client = self._keys.client(headers.get("authorization", ""))
            if client is None:
                raise RefusedError(401, "this server needs a key that it knows", "invalid_api_key")
            scope["client_of_key"] = client
            scope["log"]["client"] = client.name
        return None

    def _counted(self, log: dict[str, Any], headers: Headers, receive: Receive) -> Receive:
        """Refuses bodies that are, or say that they are, too large, and those that do not come."""
        most = self._options.most_megabytes * 10**6
        refused = RefusedError(413, f"the request is larger than {self._options.most_megabytes} MB", "too_large")
        length, whole = headers.get("content-length", "0"), False

        async def counting() -> Message:
            nonlocal whole
            if length.isdecimal() and int(length[:20]) > most:
                raise refused
            try:
                message = await asyncio.wait_for(receive(), None if whole else _PATIENCE)
            except TimeoutError:
                raise RefusedError(408, f"nothing came for {_PATIENCE} s", "timeout") from None
            size, whole = len(message.get("body", b"")), not message.get("more_body", False)
            log["bytes"] += size
            self._held += size
            if log["bytes"] > most:
                raise refused
            if self._held > _AT_ONCE * most:
                raise RefusedError(503, "other requests are too large just now", "busy")
            return message

        return counting


def _plain(error: Exception) -> Exception:
    """What Starlette raises, as what is answered."""
    if isinstance(error, HTTPException):
        return RefusedError(error.status_code, error.detail, "not_found" if error.status_code == 404 else None)
    return error


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _host(origin: str) -> str:
    """Host and port of an origin, as a Host header has them; of one that is none, what no header is."""
    try:
        return urlsplit(origin).netloc or "none"
    except ValueError:
        return "none"
