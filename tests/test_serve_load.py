"""The load test, small, in this process: what it asks, what it takes for lost or wrong, and that the server holds."""

import io
import socket
from collections import Counter
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import pipeline, serving

from benchmarks.serve import judged
from benchmarks.serve.__main__ import KEYS, load
from benchmarks.serve.asks import KINDS, MEGABYTES, Ask, _garbage, asks
from benchmarks.serve.clients import Answer, asked
from benchmarks.serve.launched import kill_thread


def test_a_load_loses_nothing(tmp_path: Path) -> None:
    """Every kind of request; the thread that draws is killed once; pictures are those of the command line."""
    (tmp_path / "keys").write_text("\n".join(f"{key} {i} 24" for i, key in enumerate(KEYS)))
    killed: list[bool] = []

    def look(done: int) -> None:
        if done >= 4 and not killed and served.studio._drawing:
            killed.append(True)  # before: whoever is told of it at once asks whether it was
            assert kill_thread()

    limits = {"queue": 24, "most_pictures": 4, "most_megabytes": MEGABYTES}
    with serving(api_key_file=str(tmp_path / "keys"), **limits) as served:
        answers = load(asks(3, 18, KEYS), 4, served.url, lambda _: bool(killed), look)
        assert killed == [True] and served.studio.metrics.value("mmdit_worker_deaths_total") == 1
    assert {answer.ask.kind for answer in answers} == {*KINDS} and len(answers) == 18
    assert {answer.outcome for answer in answers} == {"answered", "refused", "left"}, [a.told for a in answers]
    some = [answer for answer in answers if answer.files][::2]
    found = judged.compared(pipeline(), some, served.log, judged.ROUNDING["fp32"])
    assert found.wrong == [] and found.count >= 4 and max(found.alone, default=0) == 0
    lines = judged.table(answers)
    assert len(lines) == 3 + len(KINDS) and lines[-1].startswith("| all | ") and "| 0 | 0 |" in lines[-1]


def test_asks_are_those_of_the_seed() -> None:
    """Of every kind, in each its own; what they are drawn by is what they say."""
    every = asks(0, 100, KEYS)
    assert [(a.kind, a.said, a.form, a.key) for a in every] == [
        (a.kind, a.said, a.form, a.key) for a in asks(0, 100, KEYS)
    ]
    assert Counter(a.kind for a in every).keys() == {*KINDS} and {a.key for a in every} >= {*KEYS}
    for ask in every:
        assert (ask.expected == 200) == (ask.kind not in ("garbage", "wrong key"))
        assert bool(ask.pictures) == (ask.kind in ("picture", "several", "stream", "edit", "web ui", "web ui, edit"))
    assert {_garbage(Random(i), "key").expected for i in range(200)} == {400, 404, 405, 413}


@pytest.mark.parametrize(
    ("reply", "excused", "outcome"),
    [
        (b"", False, "lost"),
        (b"HTTP/1.1 500 Oh\r\n\r\n{}", False, "wrong"),
        (b"HTTP/1.1 500 Oh\r\n\r\n{}", True, "wrong"),  # not the death of the thread
        (b'HTTP/1.1 200 OK\r\n\r\n{"images": []}', False, "wrong"),
        (b"HTTP/1.1 200 OK\r\n\r\n{", False, "wrong"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", False, "lost"),
        (b"HTTP/1.1 400 No\r\n\r\n{}", False, "wrong"),
    ],
)
def test_what_is_lost_and_what_is_wrong(reply: bytes, excused: bool, outcome: str) -> None:
    ask = Ask("web ui", "/sdapi/v1/txt2img", {"prompt": "a"}, pictures=[{"prompt": "a"}])
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert once(server, reply, ask, lambda _: excused).outcome == outcome


def once(server: socket.socket, reply: bytes, ask: Ask, excused: Any) -> Answer:
    """The answer where a server sends this to whoever asks, and closes."""

    def serve() -> None:
        taken, _ = server.accept()
        with taken:
            data = b""
            while not data.endswith(b"}"):
                data += taken.recv(10_000)
            taken.sendall(reply)

    thread = Thread(target=serve)
    thread.start()
    found = asked(ask, f"http://127.0.0.1:{server.getsockname()[1]}", excused)
    thread.join()
    return found


def test_another_picture_is_noticed() -> None:
    """By a level where it was drawn alone; by more than rounding in a batch; of another size."""
    own, grey = {"prompt": "a"}, np.full((4, 4, 3), 100, np.uint8)
    pipe: Any = lambda **_: [Image.fromarray(grey)]  # noqa: E731

    def wrong(together: int, picture: np.ndarray) -> int:
        data = io.BytesIO()
        Image.fromarray(picture).save(data, format="PNG")
        answer = Answer(Ask("picture", "", pictures=[own]), id="x", files=[data.getvalue()])
        return len(judged.compared(pipe, [answer], [{"id": "x", "together": together}], 0.5).wrong)

    other = grey.copy()
    other[0, 0, 0] += 1
    assert [wrong(1, grey), wrong(1, other), wrong(2, other), wrong(2, grey + 2)] == [0, 1, 0, 1]
    assert wrong(1, grey[:2]) == wrong(2, grey[:2]) == 1


def test_quantiles() -> None:
    values = [float(i) for i in range(1, 201)]
    assert (judged.at(0.99, values), judged.at(0.5, values), judged.at(0.99, [3.0])) == (198.0, 100.0, 3.0)
