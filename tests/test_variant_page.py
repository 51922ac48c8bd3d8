"""The page on variants, followed as it stands: its file is written, its commands are run, at toy size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_every_command_of_the_page_does_what_it_says(place: Path) -> None:
    """In the page's order, each in a process of its own, in a folder that is not the clone."""
    said = {}
    for command in COMMANDS:
        _, module, *rest = command.replace('"a horse"', "horse").split()
        if module == "benchmarks.emoji.compare" and not FONT.exists():
            continue  # its judge compares with the glyphs
        line = [sys.executable, "-m", module, *rest, *TOY[module]]
        line = ["a horse" if word == "horse" else word for word in line]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(place)}
        ran = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
        said[module] = ran.stdout
    assert "FAIL" not in said["benchmarks.check_variant"]
    assert (place / "out" / "pictures" / "a-horse-0.png").exists()
    if FONT.exists():
        assert "| mine |" in said["benchmarks.emoji.compare"]


def test_what_the_page_names_is_there() -> None:
    import mmdit.attention
    import mmdit.inside
    import mmdit.model

    for owner, name in re.findall(r"`(MMDiT|JointBlock|Block|SelfAttention|MLP|LayerNorm)\.(\w+)`", PAGE):
        assert hasattr(getattr(mmdit.model, owner), name), f"{owner}.{name}"
    for name in ("capture", "ablate", "patch"):
        assert hasattr(mmdit.inside, name)
