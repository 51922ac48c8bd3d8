"""The page on variants, followed as it stands: its file is written, its commands are run, at toy size."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import OneByOne, trained_here

from benchmarks import check_variant
from benchmarks.emoji import compare, data, pace
from benchmarks.emoji.networks import MMDIT
from benchmarks.emoji.scenes import FONT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "benchmarks" / "variants" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\npython (.+)\n```", PAGE)
SMALL = ["--width", "64", "--depth", "2", "--budget", "steps:3", "--batch", "4", "--scenes", "400"]
TOY = {
    "benchmarks.check_variant": [],
    "benchmarks.emoji.train": [*SMALL, "--data", "out/variants"],
    "mmdit.run": ["--steps", "2", "--out", "out/pictures"],
    "benchmarks.emoji.compare": [*SMALL, "--seeds", "1", "--judged", "1", "--at-once", "1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's file, and numbers in the place of encoded scenes."""
    folder, g = tmp_path_factory.mktemp("page"), torch.Generator().manual_seed(0)
    (code,) = re.findall(r"```python\n# mine.py\n(.+?)```", PAGE, re.DOTALL)
    (folder / "mine.py").write_text(code)
    shapes = {"latents": (400, 16, 8, 8), "context": (400, 6, MMDIT.context_size), "pooled": (400, MMDIT.pooled_size),
              "empty_context": (1, 6, MMDIT.context_size), "empty_pooled": (1, MMDIT.pooled_size)}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}
    (folder / "out" / "variants").mkdir(parents=True)
    save_file(tensors | {"clip": torch.tensor(3)}, folder / "out" / "variants" / "scenes-64-400.safetensors")
    return folder


def test_the_commands_are_these() -> None:
    assert [command.split()[1] for command in COMMANDS] == list(TOY)


def test_every_command_of_the_page_does_what_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's order, in a folder that is not the clone; the one that draws in a process of its own."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(data, "HELD_OUT", 10)
    for pool in ("ThreadPoolExecutor", "ProcessPoolExecutor"):
        monkeypatch.setattr(compare, pool, OneByOne)
    monkeypatch.setattr(compare, "STEPS", 2)
    monkeypatch.setattr(pace, "ROUNDS", 2)
    for command in COMMANDS:
        _, module, *rest = command.replace('"a horse"', "horse").split()
        if module == "benchmarks.emoji.compare" and not FONT.exists():
            continue  # its judge compares with the glyphs
        words = ["a horse" if word == "horse" else word for word in (*rest, *TOY[module])]
        if module == "mmdit.run":
            environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(place)}
            line = [sys.executable, "-m", module, *words]
            ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            continue
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", trained_here)
            assert import_module(module).main(words) == 0, command
        said = capsys.readouterr().out
        assert "FAIL" not in said and (module != "benchmarks.emoji.compare" or "| mine |" in said), command
        assert module != "benchmarks.check_variant" or said.count("ok  ") == len(check_variant.CHECKS), command
    assert (place / "out" / "pictures" / "a-horse-0.png").exists()


def test_what_the_page_names_is_there() -> None:
    import mmdit.attention
    import mmdit.inside
    import mmdit.model

    for owner, name in re.findall(r"`(MMDiT|JointBlock|Block|SelfAttention|MLP|LayerNorm)\.(\w+)`", PAGE):
        assert hasattr(getattr(mmdit.model, owner), name), f"{owner}.{name}"
    for name in ("capture", "ablate", "patch"):
        assert hasattr(mmdit.inside, name)
