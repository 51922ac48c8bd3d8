"""What reaches the terminal: exit codes, results apart from what is said, and no character that could forge a line."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import toy_folder

import weights.__main__
from mmdit import run
from mmdit.common.command import exit_code, give, say
from mmdit.common.errors import SettingsError, UserError, one_line
from mmdit.common.errors import SettingsError as Error
from mmdit.driver.output import settings_in
from text_encoders import TokenizerError
from weights import CheckpointError

ROOT = Path(__file__).parents[1]
EVIL = "a\x1b[31m\x07\r\n\x9b\u202eb\u2028c"
DEFAULTS = {"width": 32, "height": 32, "steps": 1, "t5_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("terminal"), defaults=DEFAULTS)


def program(code: str, *arguments: object, **more: object) -> subprocess.Popen[str]:
    """The command line as a process of its own, after some lines of Python."""
    whole = f"import sys, mmdit.run\n{code}\nsys.argv[0] = 'mmdit'\nmmdit.run.command()"
    more["env"] = {**os.environ, "PYTHONUNBUFFERED": ""}  # as users run it
    command = [sys.executable, "-c", whole, *map(str, arguments), "--device", "cpu", "--dtype", "fp32"]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen(command, cwd=ROOT, **more)  # type: ignore[call-overload]


# Waits before it decodes the second picture; a signal ends it.
WAITS = """
import time
from mmdit.driver.pipeline import Pipeline
decode, calls = Pipeline.decode, []
def once(*arguments):
    calls.append(1)
    while len(calls) > 1:
        time.sleep(0.01)
    return decode(*arguments)
Pipeline.decode = once
"""


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_leaves_what_is_done(model: Path, tmp_path: Path) -> None:
    """After the first of three pictures of one run."""
    process = program(WAITS, "a horse", "--count", 3, "--model", model, "--out", tmp_path / "out")
    assert process.stdout is not None
    try:
        first = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        lines, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # else one that heeds no interrupt waits for ever
    assert (process.returncode, lines, errors) == (130, "", "interrupted: nothing more was written\n")
    assert os.listdir(tmp_path / "out") == ["a-horse-0.png"]
    settings = settings_in(Path(first))
    assert settings is not None and (settings.seed, settings.count) == (0, 1)


@pytest.mark.parametrize("arguments", [["--help"], ["a horse", "--count", "3"]])
def test_a_closed_pipe_ends_quietly(model: Path, tmp_path: Path, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = program("", *arguments, "--model", model, "--out", tmp_path / "out", stdout=write)
    os.close(write)
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, "")


def test_paths_alone_are_results(model: Path, tmp_path: Path) -> None:
    """For `| xargs`; plan and times are on standard error."""
    process = program("", "a horse", "--count", 2, "--memory", "2GB", "--model", model, "--out", tmp_path / "out")
    lines, errors = process.communicate()
    assert process.returncode == 0
    assert sorted(lines.splitlines()) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert [line.split()[0] for line in errors.splitlines()] == ["plan:", "import"]


def printable(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert all(line.isprintable() for line in text.split("\n")), text
    return captured.out + captured.err


def test_no_control_character_is_printed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a prompt, a path, an option, a list, what is inside a file; in errors, warnings and written paths."""
    base = ["--model", str(model), "--device", "cpu", "--dtype", "fp32"]
    (tmp_path / EVIL).mkdir()
    save_file({"x\x1b[2J": torch.zeros(1)}, tmp_path / EVIL / "model.safetensors", {"ss_a": EVIL})
    assert run.main(["horse " * 50 + EVIL, *base, "--out", str(tmp_path / EVIL)]) == 0
    assert "warning: prompt too long" in (text := printable(capsys)) and r"a\x1b[31m" in text
    for text in (f'{{"prompt": "x", "{json.dumps(EVIL)[1:-1]}": 1}}', json.dumps({"prompt": "x", "out": f"{EVIL}/\0"})):
        (tmp_path / EVIL / "list.jsonl").write_text(text)
        assert run.main(["--prompts", str(tmp_path / EVIL / "list.jsonl"), *base, "--out", str(tmp_path)]) == 2
        assert "line 1" in printable(capsys)
    for options in (
        ["--model", EVIL], ["--model", str(tmp_path / EVIL / "model.safetensors")], ["--lora", f"{EVIL}:x"],
        ["--out", str(tmp_path / EVIL / "model.safetensors" / EVIL)], ["--memory", EVIL], ["--cfg-interval", EVIL],
        ["--tokenizers", EVIL], ["--dump", EVIL], ["--clip-l", EVIL],
    ):  # fmt: skip
        assert run.main(["a horse", *base, *options]) == 2
        printable(capsys)
    for options in (["--steps", EVIL], [f"--{EVIL}"], ["--t5", EVIL]):
        with pytest.raises(SystemExit, match="2"):
            run.main(["a horse", *options])
        printable(capsys)
    for words in ([EVIL], [str(tmp_path / EVIL / "model.safetensors")], [str(tmp_path / EVIL)]):
        for more in ([], ["--json"]):
            weights.__main__.main([*words, *more])
            printable(capsys)
    assert weights.__main__.main(["convert", str(model), str(tmp_path / EVIL / "new"), "--layout", "diffusers",
                                  "--dtype", "fp32"]) == 0  # fmt: skip
    assert "new" in printable(capsys)


def test_every_error_of_users_is_one_line() -> None:
    for error in (SettingsError, CheckpointError, TokenizerError, Error):
        assert issubclass(error, UserError)
        assert str(error(EVIL)) == one_line(EVIL) == r"a\x1b[31m\x07\r\n\x9b\u202eb\u2028c"
        assert str(error("x" * 5000)) == "x" * 4000 + "..."
        assert len(str(error("\0" * 3999))) == 4003
    assert one_line(r"plain \n, 馬 ü 🐴") == r"plain \n, 馬 ü 🐴"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        give(EVIL)
        say(EVIL)
        raise error

    for error, code in ((CheckpointError(EVIL), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)):
        assert exit_code(lambda error=error: fail(error), "x") == code
        printable(capsys)
    assert exit_code(lambda: None, "") == 0
    with pytest.raises(ZeroDivisionError):  # what is no mistake of the user's is not hidden
        exit_code(lambda: fail(ZeroDivisionError()), "")


def test_the_program_is_installed() -> None:
    """Under its name, with its licence and the notice on the demo's glyphs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"mmdit": "mmdit.run:command"}
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE", "weights/demo/NOTICE"])
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "SIL Open Font License, Version 1.1" in (ROOT / "weights" / "demo" / "NOTICE").read_text(encoding="utf-8")
