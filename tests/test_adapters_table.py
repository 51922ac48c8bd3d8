"""Every dialect and kind of the README's tables of adapters: it is called what it is, and the command proposed merges.

Each is written twice: at full size without values, which is described, and for the toy. The one adapter in all dialects
makes the same weights, which are written out here; what each kind computes is in test_adapters_kinds.py.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_rows import ALPHA, DIALECTS, KINDS, RANK, SCALE, Content, Dialect, KindRow, content
from adapters import WIDTH, Toy, close, noise
from layouts import write
from torch import Tensor

from mmdit.common.paths import split_scale
from mmdit.run import make_parser
from weights.__main__ import main
from weights.adapters import Report
from weights.inspect import inspect

FULL = {"transformer": 1536, "clip_l": 768, "clip_g": 1280, "t5": 4096, "t5 inside": 10240}
SMALL = {"transformer": WIDTH, "clip_l": 64, "clip_g": 128, "t5": 256, "t5 inside": 512}


def hole(*shape: int, seed: str = "") -> Tensor:  # noqa: ARG001
    return torch.empty(shape, device="meta")


def described(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """What is said of the adapter, and the command line proposed for it."""
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == inspect(path)
    assert (found["kind"], found["format"], found["adapter"]["refused"]) == ("adapter", "safetensors", None)
    assert found["load"] == {"loads": True, "options": ["--lora", str(path)], "needs": [], "reason": None}
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f"  dialect     {', '.join(found['adapter']['dialects'])}"} <= set(lines)
    return found, lines[-1].removeprefix("  load ").strip()


def merged(toy: Toy, command: str, described: Path, path: Path) -> Report:
    """The adapter `path`, in the place of the one that was described, merged as the command line says."""
    words = shlex.split(command.replace(str(described), str(path)))
    settings = make_parser().parse_args(words[words.index("mmdit.run") + 1 :])
    assert settings.model == "MODEL"
    (option,) = settings.lora
    return toy.adapters.add(*split_scale(option))


@pytest.fixture(scope="module")
def pairs() -> Content:
    return content(SMALL, noise)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_dialects(tmp_path: Path, pairs: Content, capsys: pytest.CaptureFixture[str], dialect: Dialect) -> None:
    toy = Toy(tmp_path)
    for place in ("full", "toy"):
        (tmp_path / place).mkdir()
    path = dialect.write(tmp_path / "full", content(FULL, hole))
    found, command = described(path, capsys)
    adapter = found["adapter"]
    count = 3 if dialect.native or "fused" in dialect.name else 5  # q, k and v in one or apart, and two more
    assert adapter["dialects"] == [dialect.told]
    assert adapter["kinds"] == {"LoRA": count + len(dialect.encoders)}
    assert adapter["targets"] == {"transformer": count, **dict.fromkeys(dialect.encoders, 1)}
    assert adapter["ranks"] == ([RANK, 3 * RANK] if "split_qkv" in dialect.name else [RANK])
    expected = {"folded": [], "config": sorted({v for k, v in dialect.config.items() if k == "lora_alpha"} | (
        {ALPHA} if "alpha_pattern" in dialect.config else set()))}.get(dialect.alpha, [ALPHA])  # fmt: skip
    assert adapter["alphas"] == expected
    assert adapter["model"] in ("SD3-Medium or SD3.5-Medium", "SD3.5-Medium")

    report = merged(toy, command, path, dialect.write(tmp_path / "toy", pairs))
    assert report.left_out() == ""
    wanted = {place: pair for place, pair in pairs.items() if place[0] in dialect.parts}
    assert set(toy.changed()) == {(part, f"{module}.weight") for part, module in wanted}
    for (part, module), pair in wanted.items():
        change = SCALE * pair.up.double() @ pair.down.double()
        assert close(toy.weight(f"{module}.weight", part), toy.original(f"{module}.weight", part) + change), module


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
def test_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: KindRow) -> None:
    toy = Toy(tmp_path, "transformer")
    prefix = f"diffusion_model.{row.module}."
    path = write(tmp_path / "full", {prefix + role: hole(*shape) for role, shape in row.roles(1536).items()})
    found, command = described(path, capsys)
    assert found["adapter"]["dialects"] == ["ComfyUI"]
    assert found["adapter"]["kinds"] == row.told
    values = {prefix + role: noise(*shape, seed=role) for role, shape in row.roles(WIDTH).items()}
    report = merged(toy, command, path, write(tmp_path / "toy", values))
    assert (report.applied, report.left_out()) == ((f"diffusion_model.{row.module}",), "")
    changed = {("transformer", f"{row.module}.{leaf}") for leaf in ("weight", *(["bias"] if row.biased else []))}
    assert set(toy.changed()) == changed
