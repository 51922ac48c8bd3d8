"""Every layout of the README's table: it is called what it is, and the command line proposed for it draws.

Each is written twice. Once at full size, without values: that one is described. Once from the toy: the command proposed
for the first draws with the second, and the picture is that of a plain diffusers folder with the same weights, in the
last bit; for fp8 and GGUF, of a folder with the weights that the codes stand for.
"""

import json
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_rows import ROWS, Parts, Row, folder, without_dual
from layouts import PARTS, full_parts, joined, on_meta, toy_parts, write
from manifests import meta
from sweeps import sampled

from benchmarks.emoji.tokenizers import write_tokenizers
from mmdit.config import SD3_MEDIUM, SD35_LARGE
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.model import MMDiT
from mmdit.run import make_parser
from weights.__main__ import main

OPTIONS = {"--clip-l": "clip_l", "--clip-g": "clip_g", "--t5xxl": "t5", "--vae": "vae"}
SIZE = shlex.split("--device cpu --dtype fp32 --width 32 --height 32 --steps 1 --cfg 1 --t5-length 8")
CONFIGS = {"SD3-Medium": SD3_MEDIUM, "SD3.5-Large": SD35_LARGE}


class Toys:
    """The toy's parts and what stands for the words in capitals of a proposed command line."""

    def __init__(self, root: Path) -> None:
        self.root, self.words = root, root / "words"
        write_tokenizers(self.words, captions=500)
        self.parts = toy_parts(root / "folder", clip_vocab=1024, t5_vocab=512)
        self.files = {name: write(root / name, tensors) for name, tensors in self.parts.items()}

    def of(self, model: str) -> Parts:
        """Small parts of this model."""
        if model not in CONFIGS:
            return self.parts
        return {**self.parts, "transformer": without_dual(self.parts["transformer"], norm=CONFIGS[model].qk_norm)}

    def draw(self, command: list[str]) -> bytes:
        """The picture of a command line as `python -m weights` words it; a model for a part lacks that part."""
        words = command[command.index("mmdit.run") + 1 :]
        given = {OPTIONS[word] for word in words if word in OPTIONS}
        for i, word in enumerate(words):
            if word == "FILE":
                words[i] = str(self.files[OPTIONS[words[i - 1]]])
            elif word == "FOLDER":
                words[i] = str(self.words)
            elif word == "MODEL":
                rest = {name: tensors for name, tensors in self.parts.items() if name not in given}
                words[i] = str(write(self.root / "rest", joined(rest)))
        settings = Settings(**vars(make_parser().parse_args([*words, *SIZE])))
        settings = settings if settings.tokenizers else Settings(**{**vars(settings), "tokenizers": str(self.words)})
        return Pipeline.from_settings(settings).run(settings).images[0].tobytes()

    def folder_of(self, values: Parts, place: Path) -> bytes:
        """The picture of a plain float32 folder of these weights."""
        place.mkdir()
        path = folder(dtype=torch.float32)(place, values).path
        return self.draw(["mmdit.run", "a horse", "--model", str(path)])

    @cached_property
    def picture(self) -> bytes:
        return self.folder_of(self.parts, self.root / "plain")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def full(model: str) -> Parts:
    """All parts of this model at full size, without values."""
    if model not in CONFIGS:
        return full_parts()
    shapes = {name: tuple(t.shape) for name, t in meta(MMDiT, CONFIGS[model]).state_dict().items()}
    return {**full_parts(), "transformer": on_meta(shapes)}


def facts(row: Row, path: Path) -> dict[str, Any]:
    """What is to be said of the file or folder."""
    model = "transformer" in row.parts
    missing = [name for name in PARTS if name not in row.parts]
    of_folder = row.form == "diffusers folder"
    usual = {"clip_l": "transformers", "clip_g": "transformers", "t5": "transformers"}
    layouts = {name: "diffusers" if of_folder else usual.get(name, "native") for name in row.parts} | dict(row.layout)
    option = next(option for option, name in {"--model": "transformer", **OPTIONS}.items() if name in row.parts)
    needs = [f"{option} FILE" for name in missing for option, part in OPTIONS.items() if part == name]
    return {
        "kind": "checkpoint" if model else "component",
        "format": row.form,
        "model": row.model if model else None,
        "components": [(name, layouts[name], row.prefixes[name]) for name in row.parts],
        "missing": missing,
        "quantisation": list(row.quantised),
        "load": {
            "loads": True,
            "options": [option, str(path)],
            "needs": [*needs, "--tokenizers FOLDER"] if model else [],
            "reason": None,
        },
    }


@pytest.mark.parametrize("row", sampled(ROWS, 6), ids=lambda row: row.name)
def test_it_says_what_it_is_and_draws(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Row
) -> None:  # fmt: skip
    for place in ("full", "toy"):
        (tmp_path / place).mkdir()
    path = row.make(tmp_path / "full", full(row.model)).path
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    found["components"] = [(part["name"], part["layout"], part["prefix"]) for part in found["components"]]
    expected = facts(row, path)
    assert {key: found[key] for key in expected} == expected

    assert main([str(path)]) == 0
    proposed = capsys.readouterr().out.splitlines()[-1].removeprefix("  load ").strip()
    written = row.make(tmp_path / "toy", toys.of(row.model))
    command = shlex.split(proposed.replace(str(path), str(written.path)))
    own = all(torch.equal(written.values[p][n], t) for p, tensors in toys.parts.items() if p in written.values
              for n, t in tensors.items() if n in written.values[p]) and row.model not in CONFIGS  # fmt: skip
    expected = toys.picture if own else toys.folder_of(written.values, tmp_path / "plain")
    assert toys.draw(command) == expected


@pytest.mark.parametrize("part", PARTS)
def test_every_part_shows_in_these_pictures(toys: Toys, tmp_path: Path, part: str) -> None:
    """Else the comparison above would not see it."""
    other = {name: -tensor if tensor.ndim > 1 else tensor for name, tensor in toys.parts[part].items()}
    assert toys.folder_of({**toys.parts, part: other}, tmp_path / "other") != toys.picture
