"""--prompts: the file, what it writes and skips, how it is continued, and how every mistake ends."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sweeps import sampled
from toys import Ran, toy_folder

from mmdit.driver import output
from mmdit.driver.output import settings_in
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.prompts import read_prompts
from mmdit.driver.settings import Settings
from mmdit.run import main

ROOT = Path(__file__).parents[1]
DEFAULTS = {"width": 64, "height": 48, "steps": 1, "cfg": 4.5, "t5_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("prompts"), defaults=DEFAULTS)


class Desk:
    """A folder to run lists in; pictures go to `out`."""

    def __init__(self, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.folder, self.out, self.capsys = model, folder, folder / "out", capsys

    def list(self, content: str | bytes | list[dict[str, Any]], name: str = "list.txt") -> Path:
        """Write a list; objects are JSON lines."""
        text = content if isinstance(content, str | bytes) else "\n".join(json.dumps(line) for line in content)
        (self.folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return self.folder / name

    def run(self, *options: object) -> Ran:
        """In this process, with the toy and list.txt unless the options say otherwise."""
        told = [str(option) for option in options]
        told = told if "--model" in told else ["--model", str(self.model), *told]
        told = told if "--prompts" in told else ["--prompts", str(self.folder / "list.txt"), *told]
        try:
            code = main(["--dtype", "fp32", "--device", "cpu", "--out", str(self.out), *told])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = self.capsys.readouterr()
        return Ran(code, captured.out.splitlines(), captured.err.splitlines())

    def files(self) -> dict[str, tuple[bytes, int]]:
        """What lies in `out`: names, contents and times."""
        found = [path for path in self.out.rglob("*") if path.is_file()]
        return {str(p.relative_to(self.out)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


@pytest.fixture
def desk(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(model, tmp_path, capsys)


def tally(ran: Ran) -> tuple[int, int]:
    """How many were written and skipped, by the report."""
    match = re.match(r"(\d+) written(?:, \d+\.\d a minute)?; (\d+) skipped", ran.errors[-2])
    assert match, ran
    assert (ran.code, len(ran.errors), len(ran.lines)) == (0, 2, int(match[1]))
    return int(match[1]), int(match[2])


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    b"a horse\na bear\n", b"\xef\xbb\xbfa horse\r\n\r\n  a bear \t", b"\n\ra horse\ra bear\r\r",
    b'{"prompt": "a horse"}\r\n\n {"prompt": "a bear"} ', b'\xef\xbb\xbf{"prompt": "a horse"}\n{"prompt": "a bear"}',
])  # fmt: skip
def test_lines_however_they_end(desk: Desk, content: bytes) -> None:
    """Also with a mark at the beginning, blank lines and space around."""
    base = Settings(width=32, seed=4)
    lines = read_prompts(desk.list(content), base)
    assert [line.settings for line in lines] == [Settings(text, width=32, seed=4) for text in ("a horse", "a bear")]


def test_a_prompt_is_what_stands_there(desk: Desk) -> None:
    """Characters that mean something elsewhere; only line feeds and carriage returns end a line."""
    prompts = ["# a horse", '"a" // b', "馬 🐴 ü", "a\u2028b\x0bc\x85d", "[1, 2]", "a {red} horse", "--seed 3", "null"]
    assert [s.prompt for _, s in read_prompts(desk.list("\n".join(prompts)), Settings())] == prompts
    lines = [{"prompt": p} for p in [*prompts, " ", "", "two\nlines"]]
    found = read_prompts(desk.list(lines), Settings())
    assert [s.prompt for _, s in found] == [line["prompt"] for line in lines]
    assert [line.where for line in found] == [f"{desk.folder / 'list.txt'}: line {i + 1}" for i in range(len(lines))]


def test_a_line_has_every_setting_of_a_picture(desk: Desk) -> None:
    """In place of the command line's own, which stand for what it does not say."""
    every = {
        "prompt": "x", "negative": "y", "width": 32, "height": 48, "steps": 3, "cfg": 2, "seed": -1, "count": 2,
        "t5_length": 30, "out": str(desk.folder / "other"),
    }  # fmt: skip
    base = Settings(negative="n", width=64, memory="2GB", model="m", lora=("a.safetensors:1",), out=str(desk.out))
    whole, short, null = read_prompts(desk.list([every, {"prompt": "z"}, {"prompt": "z", "width": None}]), base)
    assert whole.settings == Settings(**every, memory="2GB", model="m", lora=("a.safetensors:1",))
    assert short.settings == Settings(**{**asdict(base), "prompt": "z"})
    assert null.settings.width is None


MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "list.txt: there is no prompt in it"),
    "blank": ("\n \r\n\t", "list.txt: there is no prompt in it"),
    "latin-1": (b"a horse\n\na b\xe4r", "list.txt: line 3: is not UTF-8"),
    "utf-16": ("a horse".encode("utf-16"), "list.txt: line 1: is not UTF-8"),
    "utf-16 without a mark": ("a horse".encode("utf-16-le"), "list.txt: line 1: has a character of no meaning, NUL"),
    "broken": ('{"prompt": "a"}\n{"prompt": "b"', "list.txt: line 2: is not JSON: Expecting ',' delimiter"),
    "a plain line": ('{"prompt": "a"}\na horse', "list.txt: line 2: is not JSON: Expecting value"),
    "a brace": ("{a|b} horse", "(a list whose name ends in .jsonl or that begins with { is JSON lines)"),
    "another type": ('{"prompt": "a"}\n["b"]', 'line 2: expected an object such as {"prompt": "a horse", "seed": 1}'),
    "deep": ('{"prompt": ' + "[" * 100_000, "line 1: is not JSON: nested deeper than 20"),
    "digits": ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "line 1: is not JSON: Exceeds the limit"),
    "surrogate": ('{"prompt": "a \\ud800"}', "line 1: prompt is 'a \\ud800': not valid Unicode"),
    "twice": ('{"prompt": "a", "seed": 1, "seed": 2}', "line 1: is not JSON: 'seed' is there twice"),
    "unknown": ('{"prompt": "a", "stepz": 1}', "line 1: no setting 'stepz': did you mean steps?"),
    "no prompt": ('{"seed": 1}', "line 1: has no prompt"),
    "null": ('{"prompt": null}', "line 1: prompt is None: expected text"),
    "model": ('{"prompt": "a", "model": "b"}', "line 1: model is fixed when the model is loaded, for all lines"),
    "device": ('{"prompt": "a", "device": "cpu"}', "line 1: device is fixed"),
    "memory": ('{"prompt": "a", "memory": "1GB"}', "line 1: memory belongs to the whole run"),
    "dump": ('{"prompt": "a", "dump": "x.safetensors"}', "line 1: dump belongs to the whole run"),
    "prompts": ('{"prompt": "a", "prompts": "x"}', "line 1: prompts belongs to the whole run"),
    "type": ('{"prompt": "a"}\n\n{"prompt": "b", "steps": "3"}', "line 3: steps is '3': expected a whole number"),
    "float": ('{"prompt": "a", "seed": 1.0}', "line 1: seed is 1.0"),
    "nan": ('{"prompt": "a", "cfg": NaN}', "line 1: is not JSON: NaN is no number"),
    "range": ('{"prompt": "a", "t5_length": 600}', "line 1: t5_length is 600"),
    "seeds": ('{"prompt": "a", "seed": 18446744073709551615, "count": 2}', "line 1: seed is"),
    "out": ('{"prompt": "a", "out": "list.txt/x"}', "line 1: out: cannot write into"),
    "one file": ('{"prompt": "a", "out": "x.png"}\n{"prompt": "b", "out": "./x.png"}', "x.png is also where line 1 "),
    "numbered": ('{"prompt": "a", "out": "x-2.png"}\n{"prompt": "b", "count": 2, "out": "x.png"}', "where line 1 goes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_list(desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Exit code 2 and one line that names file and line, before the model is opened; nothing is written."""
    content, message = MISTAKES[name]
    desk.list(content)
    monkeypatch.chdir(desk.folder)
    ran = desk.run("--model", "none")
    assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1)
    assert ran.errors[0].startswith("error: ")
    assert message in ran.errors[0]
    assert os.listdir(desk.folder) == ["list.txt"]


def test_mistakes_that_the_model_tells(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, before any weight is read."""
    monkeypatch.setattr("mmdit.driver.loading.Source.__call__", Mock(side_effect=AssertionError))
    desk.list([{"prompt": "a"}, {"prompt": "b", "width": 100}])
    assert "list.txt: line 2: width 100 is not a multiple of 16: the nearest are 96 or 112" in desk.run().errors[0]
    desk.list([{"prompt": "a", "height": 528}])
    assert "list.txt: line 1: height 528 is more than the model's table of positions" in desk.run().errors[0]
    desk.list([{"prompt": "a"}, {"prompt": "b", "width": 512, "height": 512}])
    assert "memory: 1 MB do not suffice for 512x512" in desk.run("--memory", "1MB").errors[0]
    assert not desk.out.exists()


def test_options_that_do_not_go_with_a_list(desk: Desk) -> None:
    for options, message in (
        (("a horse",), "expected a prompt or --prompts FILE, not both"),
        (("--dump", "x.safetensors"), "--dump is for a single run"),
        (("--out", "x.png"), "--out: x.png: expected a folder"),
        (("--prompts", desk.folder / "none.txt"), "none.txt: No such file"),
        (("--prompts", desk.folder), "Is a directory"),
        (("--prompts", "~nosuchuser/x"), "prompts: ~nosuchuser/x: Could not determine home directory"),
    ):
        ran = desk.run(*options)
        assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1)
        assert message in ran.errors[0]


# ---- what is written and skipped -----------------------------------------------------------------

LIST = [
    {"prompt": "a horse", "count": 2},
    {"prompt": "a bear", "width": 32},
    {"prompt": "a horse", "cfg": 1},
    {"prompt": "a horse", "negative": "a pig"},
    {"prompt": "a horse"},
    {"prompt": "a pig", "seed": 3, "out": "OUT/deep/x.png", "count": 2},
]
NAMES = ["a-bear-0.png", "a-horse-0-2.png", "a-horse-0-3.png", "a-horse-0.png", "a-horse-1.png"]
NAMES += ["deep/x-1.png", "deep/x-2.png"]


def with_out(desk: Desk) -> list[dict[str, Any]]:
    return [{k: v.replace("OUT", str(desk.out)) if k == "out" else v for k, v in line.items()} for line in LIST]


def test_pictures_and_a_second_run(desk: Desk) -> None:
    """Each picture is the single run's, with its settings; what is there, or twice in the list, is skipped."""
    desk.list(with_out(desk))
    ran = desk.run()
    assert tally(ran) == (7, 1)
    assert sorted(ran.lines) == [str(desk.out / name) for name in NAMES]
    times = r"import \S+ s, load \S+ s, encode \S+ s, denoise .*, save \S+ s; \S+ s in all"
    assert re.fullmatch(times, ran.errors[-1])
    files = desk.files()
    assert sorted(files) == NAMES
    for name in NAMES:
        settings = settings_in(desk.out / name)
        assert settings is not None
        assert (settings.model, settings.prompts, settings.dtype) == (str(desk.model), None, "fp32")
        alone = Pipeline.from_settings(settings).run(settings)
        assert alone.settings == settings
        with Image.open(desk.out / name) as picture:
            assert np.abs(np.asarray(picture, int) - np.asarray(alone.images[0], int)).max() <= 1
            assert picture.text["parameters"].splitlines()[0] == settings.prompt
    assert tally(desk.run()) == (0, 8)
    assert desk.files() == files


def test_what_does_not_change_a_picture_does_not_matter(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, how paths are written, whether a single run drew it, defaults that are given; all else does."""
    desk.list("a horse\n\na bear")
    assert main(["a horse", "--model", str(desk.model), "--dtype", "fp32", "--out", str(desk.out)]) == 0
    desk.capsys.readouterr()
    assert tally(desk.run()) == (1, 1)
    files = desk.files()
    monkeypatch.chdir(desk.folder)
    same = os.path.relpath(desk.model, desk.folder)
    options = ("--memory", "1GB", "--model", same, "--out", "x/../out", "--width", 64, "--cfg", 4.5)
    assert tally(desk.run(*options)) == (0, 2)
    assert desk.files() == files
    for option in (("--seed", 1), ("--dtype", "bf16")):
        assert tally(desk.run(*option)) == (2, 0), option
        assert tally(desk.run(*option)) == (0, 2), option
    assert {name: desk.files()[name] for name in files} == files


def test_only_whole_pictures_of_ours_are_there(desk: Desk) -> None:
    """A file that was cut off and another's picture keep their names; where `out` names it, it is replaced."""
    desk.list([{"prompt": "a horse"}, {"prompt": "a bear"}, {"prompt": "a pig", "out": str(desk.out / "x.png")}])
    assert tally(desk.run()) == (3, 0)
    horse, bear, pig = (desk.out / name for name in ("a-horse-0.png", "a-bear-0.png", "x.png"))
    horse.write_bytes(horse.read_bytes()[:-1])
    Image.new("RGB", (64, 48)).save(bear)
    pig.write_bytes(horse.read_bytes())
    before = desk.files()
    assert tally(desk.run()) == (3, 0)
    after = desk.files()
    assert sorted(after) == ["a-bear-0-2.png", "a-bear-0.png", "a-horse-0-2.png", "a-horse-0.png", "x.png"]
    assert [name for name in before if after[name] != before[name]] == ["x.png"]
    assert tally(desk.run()) == (0, 3)


@pytest.mark.parametrize("content", [b"", b"x", b"\x89PNG\r\n\x1a\n", output._END, b"\x89PNG\r\n\x1a\n" + output._END])
def test_files_without_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert settings_in(tmp_path / "x.png") is None
    assert settings_in(tmp_path / "none.png") is None
    assert settings_in(tmp_path) is None
    for told in ("[1]", '{"steps": "many"}', '{"new": 1}', "{"):
        info = PngInfo()
        info.add_text("mmdit", told)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
        assert settings_in(tmp_path / "x.png") is None


# ---- broken off and continued --------------------------------------------------------------------


def test_an_interrupt_and_its_continuation(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """After four pictures: they are there, whole, and nothing else; the second run draws the others."""
    desk.list(with_out(desk))
    decode, calls = Pipeline.decode, []

    def broken_off(self: Pipeline, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(self, *given)

    monkeypatch.setattr(Pipeline, "decode", broken_off)
    ran = desk.run()
    assert (ran.code, len(ran.lines), ran.errors) == (130, 4, ["interrupted: nothing more was written"])
    files = desk.files()
    assert sorted(str(desk.out / name) for name in files) == sorted(ran.lines)
    assert all(settings_in(desk.out / name) for name in files)
    assert tally(desk.run()) == (3, 5)
    assert len(calls) == 8
    after = desk.files()
    assert len(after) == 7
    assert {name: after[name] for name in files} == files
    assert tally(desk.run()) == (0, 8)


def test_a_disk_that_fills_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the third picture is written: one line, and the first two are there and no more."""
    desk.list("\n".join(f"a horse {i}" for i in range(40)))
    save, calls = Image.Image.save, []

    def full(image: Image.Image, path: Path, **more: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, **more)

    monkeypatch.setattr(Image.Image, "save", full)
    ran = desk.run()
    assert (ran.code, len(ran.lines), len(ran.errors)) == (2, 2, 1)
    assert re.fullmatch(r"error: cannot write .*a-horse-2-0\.png: No space left on device", ran.errors[0])
    assert sorted(desk.files()) == ["a-horse-0-0.png", "a-horse-1-0.png"]


def test_somebody_else_is_faster(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was not there when the run began is not replaced."""
    desk.list("a horse")
    decode = Pipeline.decode

    def slow(self: Pipeline, *given: Any) -> Any:
        desk.out.mkdir(exist_ok=True)
        (desk.out / "a-horse-0.png").write_bytes(b"theirs")
        return decode(self, *given)

    monkeypatch.setattr(Pipeline, "decode", slow)
    assert tally(desk.run()) == (1, 0)
    assert sorted(desk.files()) == ["a-horse-0-2.png", "a-horse-0.png"]
    assert desk.files()["a-horse-0.png"][0] == b"theirs"


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("how", sampled([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 3))
def test_a_killed_process(desk: Desk, how: signal.Signals) -> None:
    """At its first picture: whole pictures only, and the next run draws the others."""
    path = desk.list([{"prompt": f"a horse {i}", "width": 16 * (i % 8 + 1), "steps": 8} for i in range(16)])
    command = [sys.executable, "-u", "-m", "mmdit.run", "--prompts", path, "--model", desk.model]
    command += ["--out", desk.out, "--dtype", "fp32", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    if how is signal.SIGKILL:
        assert process.returncode == -how
    else:
        assert (process.returncode, errors) == (130, "interrupted: nothing more was written\n")
        assert [name for name in desk.files() if not name.endswith(".png")] == []
    done = [name for name in desk.files() if name.endswith(".png")]
    assert Path(first.strip()).name in done
    assert all(settings_in(desk.out / name) for name in done)
    assert tally(desk.run()) == (16 - len(done), len(done))
    assert len(desk.files()) == 16
