"""Second runs of a list take no picture of other settings for the same, and a line's settings reach the network."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import toy_folder

from mmdit import attention
from mmdit.driver.output import settings_in
from mmdit.run import main

DEFAULTS = {"width": 64, "height": 48, "steps": 2, "cfg": 4.5, "t5_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("second"), defaults=DEFAULTS)


class Desk:
    """A folder to run lists in."""

    def __init__(self, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.folder, self.capsys = model, folder, capsys

    def run(self, *words: object, out: str = "out") -> list[Path]:
        """Run the command line; returns what it wrote."""
        told = [str(word) for word in words]
        model = [] if "--model" in told else ["--model", str(self.model)]
        assert main([*told, *model, "--dtype", "fp32", "--device", "cpu", "--out", str(self.folder / out)]) == 0
        return [Path(line) for line in self.capsys.readouterr().out.splitlines()]

    def list(self, *lines: dict[str, Any], options: tuple[object, ...] = (), out: str = "out") -> list[Path]:
        """Run a list of one prompt, each line with other settings."""
        text = "\n".join(json.dumps({"prompt": "a horse", **line}) for line in lines)
        (self.folder / "list.jsonl").write_text(text)
        return self.run("--prompts", self.folder / "list.jsonl", *options, out=out)


@pytest.fixture
def desk(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(model, tmp_path, capsys)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, int)


def test_settings_of_lines(desk: Desk) -> None:
    """Size, interval, attention, T5's length: each is another picture, drawn once, with its settings inside."""
    lines = [{"width": 32}, {"height": 64}, {"cfg_interval": "0.5:1"}, {"attention": "math"}, {"t5_length": 30}]
    lines += [{"steps": 1}, {"cfg": 3.0}, {"negative": "x"}]
    (plain,) = desk.list({})
    assert len(written := desk.list({}, *lines)) == len(lines)
    assert plain not in written
    for line in lines:
        assert any(
            settings_in(path).__getattribute__(name) == value for path in written for name, value in line.items()
        )
    assert desk.list({}, *lines) == desk.list(*lines) == []


def test_another_solver_draws_anew(desk: Desk) -> None:
    """Once the file did not say what drew it, and a picture by Euler passed for one by Heun."""
    (euler,) = desk.list({})
    (heun,) = desk.list({}, options=("--sampler", "heun"))
    found = [settings_in(path) for path in (euler, heun)]
    assert [s and s.sampler for s in found] == ["euler", "heun"]
    assert np.abs(pixels(euler) - pixels(heun)).max() > 1
    files = [path.read_bytes() for path in (euler, heun)]
    assert desk.list({}) == desk.list({"sampler": "heun"}) == desk.list({}, {"sampler": "heun"}) == []
    assert len(desk.list({}, options=("--sampler", "dpmpp_2m"))) == 1
    assert [path.read_bytes() for path in (euler, heun)] == files


def test_settings_of_loading(desk: Desk) -> None:
    """Quantisation, a part from another file, another model: given as options."""
    tensors = load_file(desk.model / "text_encoder" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, desk.folder / "clip.safetensors")
    other = shutil.copytree(desk.model, desk.folder / "other")
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(vae).items()}, vae)
    assert len(desk.list({})) == 1
    for options in (
        ("--quantise", "int8"),
        ("--clip-l", desk.folder / "clip.safetensors"),
        ("--vae", vae),
        ("--t5", "off"),
    ):
        assert [len(desk.list({}, options=options)) for _ in range(2)] == [1, 0], options
    assert desk.list({}, options=("--model", other)) == []  # the model with this autoencoder
    assert desk.list({}) == []


def test_the_interval_reaches_the_network(desk: Desk) -> None:
    """Guided nowhere is the prompt alone; from a line, for a whole list, and in a single run."""
    (alone,), (guided,) = desk.run("a horse", "--cfg", 1, out="a"), desk.run("a horse", out="b")
    assert np.abs(pixels(alone) - pixels(guided)).max() > 1
    nowhere = {"cfg_interval": "0:0"}
    ways = [
        desk.list(nowhere, out="c"),
        desk.list({}, options=("--cfg-interval", "0:0"), out="d"),
        desk.run("a horse", "--cfg-interval", "0:0", out="e"),
    ]
    for (path,) in ways:
        assert np.abs(pixels(path) - pixels(alone)).max() <= 1
    plain, without = sorted(desk.list({}, nowhere, out="f"))
    for path in (plain, without):
        like = guided if settings_in(path).cfg_interval is None else alone  # type: ignore[union-attr]
        assert np.abs(pixels(path) - pixels(like)).max() <= 1


def test_the_attention_reaches_the_network(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that attends to nothing gives another picture, wherever it is asked for, and nowhere else."""
    monkeypatch.setitem(attention.BACKENDS, "math", lambda q, *_: torch.zeros_like(q))
    (plain,), (nothing,) = desk.run("a horse", out="a"), desk.run("a horse", "--attention", "math", out="b")
    assert np.abs(pixels(plain) - pixels(nothing)).max() > 1
    (listed,) = desk.list({}, options=("--attention", "math"), out="c")
    assert np.abs(pixels(listed) - pixels(nothing)).max() <= 1
    for path in desk.list({}, {"attention": "math"}, out="d"):
        like = nothing if settings_in(path).attention == "math" else plain  # type: ignore[union-attr]
        assert np.abs(pixels(path) - pixels(like)).max() <= 1
