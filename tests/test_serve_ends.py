"""How the server begins and ends: loading, SIGTERM, command lines that cannot be; what it logs and counts."""

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from served import SMALL, Served, gated, pipeline, wait

from mmdit.serve import app
from mmdit.serve.__main__ import main
from mmdit.serve.logs import in_json
from mmdit.serve.metrics import Metrics
from mmdit.serve.options import ServeOptions

ASKED = {"prompt": "a horse", "seed": 1, **SMALL}
DRAW = "/v1/images/generations"


def test_while_it_is_loaded_and_when_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """503 for new ones; what is drawn is answered; the command ends with 0 and has told its address."""
    here, told, log, made = Event(), list[str](), list[str](), list[app.Server]()

    def loaded(_: object) -> Any:
        assert here.wait(30)
        return pipeline()

    class Server(app.Server):
        def __init__(self, options: ServeOptions) -> None:
            super().__init__(options, log=log.append)
            made.append(self)

    monkeypatch.setattr(app, "loaded", loaded)
    monkeypatch.setattr(app, "give", told.append)
    monkeypatch.setattr(app, "Server", Server)
    failures: list[BaseException] = []

    def asks() -> None:
        try:
            wait(lambda: made and made[0].started)
            served = Served(told[0], made[0], log)
            assert served.get("/health").status_code == 200 and served.get("/ready").status_code == 503
            assert served.post(DRAW, ASKED).status_code == 503
            here.set()
            wait(lambda: served.get("/ready").status_code == 200)
            with gated(served.studio) as gate, ThreadPoolExecutor(1) as pool:
                first = pool.submit(served.post, DRAW, ASKED)
                gate.reached.wait(30)
                os.kill(os.getpid(), signal.SIGTERM)
                wait(lambda: not served.studio.ready)
                answer = served.post(DRAW, ASKED)
                assert answer.status_code == 503 and "retry-after" in answer.headers
                assert served.get("/ready").json() == {"status": "stopping"}
                gate.open()
                assert first.result().status_code == 200
        except BaseException as error:
            failures.append(error)
            made[0].should_exit = True

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = Thread(target=asks)
    thread.start()
    try:
        assert main(["--port", "0", "--device", "cpu", "--dtype", "fp32"]) == 0
    finally:
        thread.join(30)
        signal.signal(signal.SIGTERM, before)
    assert failures == []


def test_what_is_loaded_keeps_texts_and_shows_none(recwarn: pytest.WarningsRecorder) -> None:
    """No line of standard error has the end of a prompt that is cut off."""
    pipe = app.loaded(ServeOptions(device="cpu", dtype="fp32", memory="2GB"))
    assert pipe.remembered is not None and pipe.remembered.most == 100_000_000
    for _ in range(2):
        pipe("a horse " * 60, width=64, height=48, steps=1)
    assert len(recwarn) == 0 and pipe.remembered.hits == pipe.remembered.misses == 2


def test_what_libraries_log_is_json_too() -> None:
    lines, before = list[str](), [*logging.getLogger().handlers]
    with in_json(lines.append):
        handlers = [one for one in logging.getLogger().handlers if one not in before]
        try:
            raise ValueError("a mistake")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("in an\napplication")
    (handler,) = handlers
    handler.handle(logging.makeLogRecord({"msg": "%d pictures", "args": ("no",)}))  # a mistake of who logs
    line, other = map(json.loads, lines)
    assert other["message"] == "%d pictures"
    assert line["message"] == "in an application: ValueError('a mistake')" and line["level"] == "error"


def test_metrics_are_texts_of_prometheus() -> None:
    metrics = Metrics()
    metrics.add("mmdit_requests_total", route='a"b\\', status="200")
    metrics.add("mmdit_requests_total", 2, route='a"b\\', status="200")
    for value in (0.5, 1.5):
        metrics.observe("mmdit_step_seconds", value)
    lines = metrics.text({("mmdit_ready", ()): 1.0}).splitlines()
    assert 'mmdit_requests_total{route="a\\"b\\\\",status="200"} 3' in lines
    assert lines.index("# TYPE mmdit_step_seconds summary") + 1 == lines.index("mmdit_step_seconds_sum 2")
    assert "mmdit_step_seconds_count 2" in lines and "mmdit_ready 1" in lines


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--host", "0.0.0.0"], "which others reach"),
        (["--port", "70000"], "a port from 1 to 65535"),
        (["--most-pictures", "65"], "at most those of the queue, 64"),
        (["--origin", "example.org"], "an origin"),
        (["--api-key-file", "/nowhere"], "api_key_file: /nowhere: No such file"),
        (["--host", "192.0.2.1", "--api-key-file", "KEYS"], "cannot listen at"),
        (["--model", "/nowhere/model", "--port", "0"], "/nowhere/model"),
        (["--memory", "much"], "memory is 'much'"),
    ],
)
def test_command_lines_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    (tmp_path / "keys").write_text("sk-0123456789abcdef")
    assert main([word.replace("KEYS", str(tmp_path / "keys")) for word in line]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("error: ") and said in told


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmdit.serve.__main__.find_spec", lambda name: None if name == "uvicorn" else name)
    assert main([]) == 2
    assert "the server needs uvicorn: pip install 'mmdit[serve]'" in capsys.readouterr().err


def test_help_and_mistakes_answer_without_torch() -> None:
    code = "import sys; from mmdit.serve.__main__ import main; print(main(['--port', '-1']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "2 False", done
