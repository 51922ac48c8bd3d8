"""Clients: each sends a request, reads the answer, and asks again where a client should."""

import base64
import http.client
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serve.asks import Ask

PATIENCE = 120.0  # seconds that a client waits for anything
AGAIN = 0.25  # seconds after which it asks again where there is no server
_BOUNDARY = "a-boundary-that-no-picture-has"

try:
    import openai
except ImportError:  # then all is asked in plain HTTP
    openai = None


@dataclass
class Answer:
    """What became of a request."""

    ask: Ask
    outcome: str = ""  # answered, refused, left, lost, wrong
    told: str = ""  # of the two last: what happened
    seconds: float = 0.0  # from the first try to the end
    id: str = ""  # of the request, as the server's log has it
    files: list[bytes] = field(default_factory=list)
    tries: Counter[str] = field(default_factory=Counter)  # those before the last, by what they met


class RefusedError(Exception):
    """The server's answer is an error."""

    def __init__(self, status: int, code: str = "", after: float = 1.0) -> None:
        super().__init__(f"{status} {code}")
        self.status, self.code, self.after = status, code, after


class LeftError(Exception):
    """The client has left, as it meant to."""


def asked(ask: Ask, url: str, excused: Callable[[float], bool]) -> Answer:
    """Ask until there is an answer. excused: whether the server was made to die since this moment."""
    answer, begun = Answer(ask), time.monotonic()
    while not answer.outcome:
        tried = time.monotonic()
        try:
            answer.id, answer.files = (_by_openai if _is_openais(ask) else _plainly)(ask, url)
            if len(answer.files) < len(ask.pictures) and excused(tried):
                raise ConnectionError("the stream broke off")
            whole = len(answer.files) == len(ask.pictures)
            answer.outcome = "answered" if ask.expected == HTTPStatus.OK and whole else "wrong"
            answer.told = "" if answer.outcome == "answered" else f"200 with {len(answer.files)} pictures"
        except LeftError:
            answer.outcome = "left"
        except RefusedError as error:
            _refused(answer, error, excused(tried))
        except (OSError, http.client.HTTPException) as error:
            if not excused(tried) or time.monotonic() - begun > PATIENCE:
                answer.outcome, answer.told = "lost", repr(error)
            answer.tries["connection broken, server killed"] += 1
            time.sleep(AGAIN)
        except (ValueError, KeyError, TypeError) as error:
            answer.outcome, answer.told = "wrong", f"cannot be read: {error!r}"
    answer.seconds = time.monotonic() - begun
    return answer


def _refused(answer: Answer, error: RefusedError, excused: bool) -> None:
    """Again or not, as clients do."""
    if error.status == answer.ask.expected:
        answer.outcome = "refused"
    elif error.status == HTTPStatus.TOO_MANY_REQUESTS and not answer.ask.leaves:
        answer.tries["429"] += 1
        time.sleep(error.after)
    elif error.status == HTTPStatus.TOO_MANY_REQUESTS:
        answer.outcome = "left"
    elif excused and (error.status == HTTPStatus.SERVICE_UNAVAILABLE or error.code == "worker_died"):
        answer.tries[f"{error.status} {error.code}"] += 1
        time.sleep(AGAIN)
    else:
        answer.outcome, answer.told = "wrong", str(error)


# ---- in plain HTTP -----------------------------------------------------------------------------------


@contextmanager
def _answering(ask: Ask, url: str, timeout: float) -> Iterator[http.client.HTTPResponse]:
    address = urlsplit(url)
    assert address.hostname and address.port
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    body, headers = ask.raw, {"authorization": f"Bearer {ask.key}"}
    if ask.said is not None:
        body, headers["content-type"] = json.dumps(ask.said).encode(), "application/json"
    elif ask.form:
        body, headers["content-type"] = _form(ask), f"multipart/form-data; boundary={_BOUNDARY}"
    elif ask.raw is not None and ask.path.endswith("edits"):
        headers["content-type"] = "multipart/form-data; boundary=x"
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # a server may answer before it has read all
            connection.request(ask.method, ask.path, body, headers)
        yield connection.getresponse()
    finally:
        connection.close()


def _form(ask: Ask) -> bytes:
    parts = []
    for name, value in ask.form:
        head = f'content-disposition: form-data; name="{name}"'
        head += '; filename="a.png"\r\ncontent-type: image/png' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        parts.append(f"--{_BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()


def _plainly(ask: Ask, url: str) -> tuple[str, list[bytes]]:
    try:
        with _answering(ask, url, PATIENCE if ask.leaves is None else max(0.001, ask.leaves)) as response:
            name = response.headers.get("x-request-id", "")
            if response.status != HTTPStatus.OK:
                raise _error(response.status, response.headers.get("retry-after"), response.read())
            if ask.leaves is not None and ask.streams:
                response.readline()
                raise LeftError
            data = response.read()
    except TimeoutError:
        if ask.leaves is None:
            raise
        raise LeftError from None
    if not ask.pictures:
        if ask.leaves is not None:
            raise LeftError  # it came before that
        return name, []
    return name, [base64.b64decode(text) for text in _texts(ask, data)]


def _error(status: int, after: str | None, body: bytes) -> RefusedError:
    code: Any = ""
    with suppress(ValueError, TypeError, AttributeError):
        said = json.loads(body)["error"]
        code = said["code"] if isinstance(said, dict) else said
    return RefusedError(status, str(code or ""), float(after or 1))


def _texts(ask: Ask, data: bytes) -> list[str]:
    """The pictures of an answer, in base64."""
    if not ask.streams:
        said = json.loads(data)
        return said["images"] if "images" in said else [one["b64_json"] for one in said["data"]]
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
    return _last(events)


def _last(events: list[dict[str, Any]]) -> list[str]:
    """The whole pictures among a stream's events, in their order."""
    for event in events:
        if "error" in event:
            raise RefusedError(500, str(event["error"].get("code") or ""))
    done = [event for event in events if event["type"].endswith(".completed")]
    return [event["b64_json"] for event in sorted(done, key=lambda one: one.get("index", 0))]


# ---- by OpenAI's client ------------------------------------------------------------------------------


def _is_openais(ask: Ask) -> bool:
    return openai is not None and ask.kind in ("picture", "several", "stream")


def _by_openai(ask: Ask, url: str) -> tuple[str, list[bytes]]:
    assert openai is not None and ask.said is not None
    own = {name: value for name, value in ask.said.items() if name in ("n", "stream", "partial_images")}
    extra = {name: value for name, value in ask.said.items() if name not in ("prompt", "width", "height", *own)}
    size: Any = f"{ask.said['width']}x{ask.said['height']}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=ask.key, max_retries=0, timeout=PATIENCE) as client:
            generate: Any = client.images.generate
            found = generate(prompt=ask.said["prompt"], size=size, extra_body=extra, **own)
            if not ask.streams:
                return found._request_id or "", [base64.b64decode(one.b64_json or "") for one in found.data or []]
            with found:
                name = found.response.headers.get("x-request-id", "")
                texts = _last([event.model_dump() for event in found])
                return name, [base64.b64decode(text) for text in texts]
    except openai.APIStatusError as error:
        after = error.response.headers.get("retry-after")
        raise RefusedError(error.status_code, error.code or "", float(after or 1)) from None
    except openai.APIConnectionError as error:
        raise ConnectionError(repr(error.__cause__ or error)) from None
    except openai.APIError as error:  # in the middle of a stream
        raise RefusedError(500, error.code or "") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise ConnectionError(repr(error)) from None


def garbage_bytes(url: str) -> str:
    """What comes back for bytes that are no HTTP at all."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as plain:
        plain.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP\r\n\r\n")
        return plain.recv(100).decode(errors="replace").partition("\r")[0]
