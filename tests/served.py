"""A server of the demo model in a thread of its own, at a free port, for tests to ask."""
# ruff: noqa: E402

import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Event, Semaphore, Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

for _package in ("starlette", "uvicorn", "python_multipart", "openai", "httpx2"):
    pytest.importorskip(_package, reason=f"the extra `serve` and its tests need {_package}")

import httpx2
import openai

from mmdit.driver.pipeline import Pipeline
from mmdit.serve.app import Server, address_of, listening
from mmdit.serve.options import ServeOptions
from mmdit.serve.studio import Studio

SMALL = {"width": 64, "height": 48, "steps": 4}


@cache
def pipeline() -> Pipeline:
    """The demo model. Nothing may be changed of it."""
    return Pipeline.load(device="cpu", dtype="fp32")


@dataclass
class Served:
    url: str
    server: Server
    lines: list[str]  # of its log
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def studio(self) -> Studio:
        return self.server.studio

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def client(self, **more: Any) -> openai.OpenAI:
        plain = openai.DefaultHttpxClient(verify=False)  # certificates are not read, which takes longer than a request
        more = {"api_key": "none", "max_retries": 0, "http_client": plain, **more}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **more))
        return self.clients[-1]

    def post(self, path: str, said: Any = None, **more: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=said, timeout=60, verify=False, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, verify=False, **more)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


@contextmanager
def serving(**more: Any) -> Iterator[Served]:
    """more: options of the server."""
    options = ServeOptions(**{"port": 0, "device": "cpu", "dtype": "fp32", **more})
    options.check()
    lines: list[str] = []
    server = Server(options, load=pipeline, log=lines.append)
    with listening(options) as listener:
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait(lambda: server.studio.loaded and server.started)
            served = Served(address_of(listener), server, lines)
            yield served
            for client in served.clients:
                client.close()
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait(done: Any) -> None:
    """Until this is so; it is to be so soon."""
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


class Gate:
    """Stands between the steps of a studio: none is taken until it is let, or the gate is open."""

    def __init__(self) -> None:
        self.reached = Event()
        self.steps: list[int] = []  # the seeds that took each
        self.shut()

    def shut(self) -> None:
        self._open, self._permits = False, Semaphore(0)
        self.steps.clear()
        self.reached.clear()

    def let(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self.let(1000)

    def step(self, seed: int) -> None:
        self.steps.append(seed)
        self.reached.set()
        assert self._open or self._permits.acquire(timeout=30)


@contextmanager
def gated(studio: Studio) -> Iterator[Gate]:
    """A studio that waits before each step is told until it is let; at the end the gate is open."""
    gate, step = Gate(), studio.stepped

    def stepped(place: Any, look: Any) -> None:
        gate.step(place.settings.seed)
        step(place, look)

    studio.stepped = stepped  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.open()
        wait(lambda: not studio.busy)
        del studio.stepped


def drawn(text: str | None) -> np.ndarray:
    """The pixels of a picture in base64."""
    assert text
    return np.asarray(opened(text).convert("RGB"))


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def file_of(image: Image.Image, form: str = "PNG", **more: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format=form, **more)
    return data.getvalue()


def sent(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """A picture without meaning."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 4, columns * 3, rows + columns], axis=-1).astype(np.uint8))
