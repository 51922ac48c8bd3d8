"""The command line in several processes: the pictures of one, what is said, and that nobody waits for the dead."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from several import commands, several
from toys import Ran, toy_folder

import mmdit.run
from benchmarks import random_checkpoint
from mmdit.common.errors import SettingsError
from mmdit.config import TOY
from mmdit.driver.pipeline import Pipeline
from mmdit.parallel import tokens
from mmdit.parallel.ranks import Ranks
from mmdit.parallel.together import together

PLAIN = ["a horse and a bear", "--dtype", "fp32", "--device", "cpu"]
ROOT = Path(__file__).parents[1]
CONTROL = str(ROOT / "weights" / "demo" / "controlnet")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


@pytest.fixture
def alone() -> Iterator[None]:
    """As many threads as the others have: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_one(options: list[str]) -> None:
    assert mmdit.run.main(options) == 0


def refusal(ran: list[Ran]) -> str:
    """The error that the first of the processes tells, where all end with 2 and the others say nothing."""
    assert [(one.code, one.lines) for one in ran] == [(2, [])] * len(ran), ran
    assert not any(one.errors for one in ran[1:])
    (error,) = [line for line in ran[0].errors if not line[0].isdigit()]  # "2 texts by 4 processes: ..."
    return error


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("size", "way", "more"),
    [
        (4, "both", []),
        (2, "tokens", ["--count", "2", "--pag", "1", "--slg", "1", "--control", CONTROL, "--control-image", "EDGES"]),
        (2, "guidance", ["--focus", "horse; bear", "--cfg-interval", "0:0.9"]),
        pytest.param(4, "tokens", ["--sampler", "heun"], marks=pytest.mark.sweep),
        pytest.param(4, "guidance", ["--count", "3"], marks=pytest.mark.sweep),
        pytest.param(3, "auto", ["--count", "4", "--init", "EDGES"], marks=pytest.mark.sweep),
        pytest.param(2, "tokens", ["--width", "176", "--height", "80"], marks=pytest.mark.sweep),
    ],
)
def test_the_picture_of_one_process(tmp_path: Path, size: int, way: str, more: list[str]) -> None:
    """Bit for bit, as each process has 16 tokens. One speaks and writes."""
    edges = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    options = [*PLAIN, "--steps", "3", *(str(tmp_path / "edges.png") if x == "EDGES" else x for x in more)]
    by_one([*options, "--out", str(tmp_path / "one")])
    ran = commands(size, [*options, "--parallel", way, "--out", str(tmp_path / "several")])
    assert [one.code for one in ran] == [0] * size, ran
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "several").iterdir())
    for name in files:
        assert np.array_equal(pixels(tmp_path / "one" / name), pixels(tmp_path / "several" / name)), name
    if way != "auto":
        assert [len(one.lines) for one in ran] == [len(files)] + [0] * (size - 1)
        assert not any(one.errors for one in ran[1:])
        assert f"{size} processes" in " ".join(ran[0].errors)


@pytest.mark.parametrize(("way", "alone"), [("auto", 4), pytest.param("pictures", 5, marks=pytest.mark.sweep)])
def test_a_list_is_shared_and_its_rest_drawn_together(tmp_path: Path, way: str, alone: int) -> None:
    """Of five pictures two processes draw two each, alone, and the fifth together; run again, none."""
    prompts = tmp_path / "list.txt"
    prompts.write_text("a horse\na bear\na fox\na pig\na cow\n")
    options = ["--prompts", str(prompts), "--dtype", "fp32", "--device", "cpu", "--steps", "2", "--parallel", way]
    by_one([*options, "--out", str(tmp_path / "one")])
    ran = commands(2, [*options, "--out", str(tmp_path / "several")])
    assert [one.code for one in ran] == [0, 0], ran
    assert [len(one.lines) for one in ran] == [3, 2]
    assert f"{alone} pictures by 2 processes, each its own" in ran[0].errors
    assert any(line.startswith("5 written") for line in ran[0].errors) and not ran[1].errors
    for path in (tmp_path / "one").iterdir():
        assert np.abs(pixels(path) - pixels(tmp_path / "several" / path.name)).max() <= 1  # drawn in another batch
    ran = commands(2, [*options, "--out", str(tmp_path / "several")])
    assert [(one.code, one.lines) for one in ran] == [(0, []), (0, [])]
    assert any(line.startswith("0 written; 5 skipped") for line in ran[0].errors)


def at_exchange(number: int, act: Any) -> None:
    """Do something in the place of one exchange, the first time that it comes."""
    exchange, count = tokens.Exchanges.__call__, [0]

    def call(self: tokens.Exchanges, sent: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            act()
        return exchange(self, sent)

    tokens.Exchanges.__call__ = call


def dies(rank: int) -> None:
    if rank == 1:
        at_exchange(30, lambda: os.kill(os.getpid(), signal.SIGKILL))


def has_no_memory(rank: int) -> None:
    if rank == 1:
        at_exchange(30, _no_memory)


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def is_wrong(rank: int) -> None:
    if rank == 1:
        at_exchange(30, _wrong)


def _wrong() -> None:
    raise SettingsError("something of process 1's")


def test_nobody_waits_for_the_dead(tmp_path: Path) -> None:
    options = [*PLAIN, "--parallel", "tokens", "--steps", "3", "--out", str(tmp_path / "out")]
    first, killed, third, fourth = commands(4, options, dies)
    assert killed is None
    assert refusal([first, third, fourth]).startswith("error: another process of this run has ended")
    assert not (tmp_path / "out").exists()


def test_an_error_of_one_is_that_of_all(tmp_path: Path) -> None:
    options = [*PLAIN, "--parallel", "tokens", "--steps", "3", "--out", str(tmp_path / "out")]
    assert refusal(commands(2, options, is_wrong)) == "error: something of process 1's"
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_in_one_makes_a_smaller_plan_for_all(tmp_path: Path) -> None:
    options = [*PLAIN, "--steps", "3", "--count", "3"]
    by_one([*options, "--out", str(tmp_path / "one")])
    ran = commands(2, [*options, "--parallel", "tokens", "--out", str(tmp_path / "several")], has_no_memory)
    assert [one.code for one in ran] == [0, 0], ran
    assert len([line for line in ran[0].errors if "memory ran out; trying again with less" in line]) == 1
    for path in (tmp_path / "one").iterdir():
        assert np.abs(pixels(path) - pixels(tmp_path / "several" / path.name)).max() <= 1


def stopped(ranks: Ranks) -> list[int]:
    """The seeds of the pictures that are drawn where the second process stops one of three."""
    pipe = Pipeline.load(device="cpu", dtype="fp32")

    def look(event: Any) -> None:
        if ranks.rank == 1 and event.settings.seed == 1 and event.step.index == 1:
            event.stop()

    with together(pipe, ranks, "tokens"):
        drawn = pipe.draw_many([{"prompt": "a horse", "seed": i, "steps": 3} for i in range(3)], on_step=look)
        return [settings.seed for settings, _ in drawn]


def test_a_stop_by_one_is_one_by_all() -> None:
    assert several(2, stopped) == [[0, 2], [0, 2]]


def in_strips(ranks: Ranks | None) -> np.ndarray:
    """A picture decoded in strips."""
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    plan_for = pipe.plan_for
    pipe.plan_for = lambda job: replace(plan_for(job), strip=3)  # type: ignore[method-assign]
    with nullcontext() if ranks is None else together(pipe, ranks, "guidance"):
        return np.asarray(pipe("a horse", steps=2, width=112)[0])


@pytest.mark.usefixtures("alone")
def test_strips_are_shared() -> None:
    expected = in_strips(None)
    for found in several(2, in_strips):
        assert np.array_equal(found, expected)


@pytest.mark.usefixtures("alone")
def test_three_share_twelve_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 9x7 tokens: 21 for each."""
    twelve = replace(TOY, hidden_size=192, num_heads=12)
    monkeypatch.setitem(random_checkpoint.MODELS, "toy", twelve)
    folder = toy_folder(tmp_path)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | twelve.to_json()))
    options = ["a horse", "--model", str(folder), "--dtype", "fp32", "--device", "cpu", "--steps", "2"]
    options += ["--width", "144", "--height", "112", "--t5-length", "21"]
    by_one([*options, "--out", str(tmp_path / "one.png")])
    ran = commands(3, [*options, "--parallel", "tokens", "--out", str(tmp_path / "three.png")])
    assert [one.code for one in ran] == [0, 0, 0], ran
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "three.png"))


def test_torchrun(tmp_path: Path) -> None:
    """The command as users type it."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmdit.run"]
    line += [*PLAIN, "--steps", "1", "--out", str(tmp_path / "horse.png")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(tmp_path / "horse.png")]), done.stderr
    assert "2 texts by 2 processes: " in done.stderr


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (2, ["--parallel", "pictures", "--dump", "DUMP"], "a dump is written by one process"),
        (3, ["--parallel", "tokens"], "3 processes cannot share 4 heads: expected a number that divides it"),
        (3, ["--parallel", "guidance"], "guidance needs an even number of processes, these are 3"),
        (2, ["--steps", "0"], "steps is 0"),
    ],
)
def test_mistakes_are_told_once(tmp_path: Path, size: int, options: list[str], message: str) -> None:
    options = [str(tmp_path / "dump.safetensors") if option == "DUMP" else option for option in options]
    assert message in refusal(commands(size, [*PLAIN, *options, "--out", str(tmp_path / "out")]))


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(mmdit.run, "hush", lambda: None)
    assert mmdit.run.main(PLAIN) == 2
    assert "has WORLD_SIZE '2' and RANK '2': expected those that torchrun sets" in capsys.readouterr().err
