"""Names and shapes of published checkpoints, for tests: a committed list, and fuller manifests if present."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden" / "sd35_medium.txt"
MANIFESTS = Path(__file__).parents[2] / "shared" / "reference" / "manifests"

SMALL = {"clip_vocab": 96, "t5_vocab": 80}  # vocabularies that keep toy checkpoints light
NATIVE_MARK = "joint_blocks.0.context_block.attn.qkv.weight"

Shapes = dict[str, tuple[int, ...]]


def meta(kind: type, config: object) -> nn.Module:
    """A module of shapes without values."""
    with torch.device("meta"):
        return kind(config)


def golden() -> dict[str, Shapes]:
    """{component: {native name: shape}} of SD3.5-Medium."""
    parts: dict[str, Shapes] = {}
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        name, shape = line.split()
        part, key = name.split(":")
        parts.setdefault(part, {})[key] = tuple(int(n) for n in shape.split(","))
    return parts


def manifest(name: str) -> Any:
    """The JSON of one manifest; skips the test where the manifests are not at hand."""
    path = MANIFESTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no {name} manifest beside the checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def shapes(name: str) -> Shapes:
    """A {name: shape} manifest with shapes as tuples."""
    return {key: tuple(shape) for key, shape in manifest(name).items()}
