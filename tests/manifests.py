"""Names, shapes and configurations of published checkpoints, for tests (see data/README.md)."""

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = Path(__file__).parent / "data"

SMALL = {"clip_vocab": 96, "t5_vocab": 80}  # vocabularies that keep toy checkpoints light
NATIVE_MARK = "joint_blocks.0.context_block.attn.qkv.weight"

# Which manifest has the native names of which part of SD3.5-Medium.
_PARTS = {
    "transformer": "sd35_medium.stability.mmdit",
    "vae": "vae.stability",
    "clip_l": "clip_l.file",
    "clip_g": "clip_g.file",
    "t5": "t5xxl.hf_sharded_219",
}

Shapes = dict[str, tuple[int, ...]]


def meta(kind: type, config: object) -> nn.Module:
    """A module of shapes without values."""
    with torch.device("meta"):
        return kind(config)


@cache
def manifests() -> dict[str, Any]:
    """All of them by name; not to be written to."""
    return json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))


def manifest(name: str) -> Any:
    return manifests()[name]


def shapes(name: str) -> Shapes:
    """A {name: shape} manifest with shapes as tuples."""
    return {key: tuple(shape) for key, shape in manifest(name).items()}


def golden() -> dict[str, Shapes]:
    """{component: {native name: shape}} of SD3.5-Medium."""
    return {part: shapes(name) for part, name in _PARTS.items()}
