"""The page for browsers at `/`: its files, read once, and what browsers are told of them."""

import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("main", "api", "dom", "form", "history", "mask", "stage")
    },
}
# Nothing from elsewhere, nothing written into the page's own text, no page around it, and no text becomes markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def routes() -> list[Route]:
    return [Route(path, answer, methods=["GET"]) for path in FILES]


async def answer(request: Request) -> Response:
    """One of the files, or 304 where the browser has it."""
    name, kind = FILES[request.scope["path"]]
    data, tag = _read(name)
    headers = {**_HEADERS, "etag": tag}
    if tag in [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": kind})


@cache
def _read(name: str) -> tuple[bytes, str]:
    """What is in a file, and a tag that tells whether it is the same."""
    data = (PAGE / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'
