"""Files for the tests of loading: the toy and its parts, and published names with every tensor made small."""

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from manifests import SMALL, Shapes, golden
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.random_checkpoint import write_checkpoint
from weights import Component, open_checkpoint
from weights.header import DTYPES
from weights.published import PREFIXES

PARTS = ("transformer", "vae", "clip_l", "clip_g", "t5")
Tensors = dict[str, Tensor]


def toy_parts(folder: Path, **sizes: int) -> dict[str, Tensors]:
    """{component: {native name: tensor}} of the toy, whose diffusers folder is written to `folder`."""
    checkpoint = open_checkpoint(write_checkpoint(folder, **(sizes or SMALL)))
    parts = {}
    for part in PARTS:
        component = checkpoint.component(part)
        parts[part] = {name: component.read(name).clone() for name in component.shapes}
    parts["clip_l"].pop("text_projection.weight")  # the folder's identity, which no other file has
    return parts


def joined(parts: Mapping[str, Tensors], prefixes: Mapping[str, str] = PREFIXES) -> Tensors:
    """The tensors of several parts in one file."""
    return {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file; tensors that share memory or are not contiguous are stored as copies, those on "meta" as
    holes in the file: it has its full size and takes no room, and whoever reads it is slow."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return _write_with_holes(path, tensors, metadata)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def _write_with_holes(path: Path, tensors: Tensors, metadata: dict[str, str] | None) -> Path:
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
        for name, tensor in tensors.items():
            if not tensor.is_meta and tensor.numel():
                file.seek(8 + len(raw) + header[name]["data_offsets"][0])
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return path


def full_parts() -> dict[str, Tensors]:
    """{component: {native name: tensor}} of SD3.5-Medium at full size, float16 on "meta"."""
    return {part: dict(tensors) for part, tensors in _full_parts().items()}


@cache
def _full_parts() -> dict[str, Tensors]:
    return {part: on_meta(names) for part, names in golden().items()}


def on_meta(shapes: Shapes, dtype: torch.dtype = torch.float16) -> Tensors:
    """Tensors of these shapes without values."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def check_tensors(component: Component, expected: Tensors) -> None:
    """All names, shapes, dtypes as announced, and values equal to the last bit."""
    assert set(component.shapes) == set(expected)
    for name, tensor in expected.items():
        got = component.read(name)
        assert (component.shapes[name], component.dtypes[name]) == (tuple(got.shape), got.dtype), name
        assert torch.equal(got.double(), tensor.double()), name


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with every side of 64 and more divided by 64; thirds, halves and heads stay what they are."""
    return tuple(n // 64 if n >= 64 else n for n in shape)


def small_tensors(shapes: Shapes, prefix: str = "") -> Tensors:
    """Float16 values for these names, small, each drawn by its name alone."""
    drawn = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn[prefix + name] = torch.randn(small(shape), generator=generator).half()
    return drawn


def written_again(path: Path, change: Mapping[str, Tensor]) -> Path:
    """The file with some tensors exchanged or added."""
    return write(path, {**load_file(path), **change})
