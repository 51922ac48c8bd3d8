"""Files for the tests of loading: the toy and its parts, and published names with every tensor made small."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from manifests import SMALL, Shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.random_checkpoint import write_checkpoint
from weights import Component, open_checkpoint
from weights.published import PREFIXES

PARTS = ("transformer", "vae", "clip_l", "clip_g", "t5")
Tensors = dict[str, Tensor]


def toy_parts(folder: Path) -> dict[str, Tensors]:
    """{component: {native name: tensor}} of the toy, whose diffusers folder is written to `folder`."""
    checkpoint = open_checkpoint(write_checkpoint(folder, **SMALL))
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
    """A safetensors file; tensors that share memory or are not contiguous are stored as copies."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


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


def write_gguf(
    path: Path, tensors: Mapping[str, tuple[np.ndarray, Type]], arch: str = "sd3", shapes: Mapping[str, list[int]] = {}
) -> Path:  # fmt: skip
    """A GGUF file by the package's writer; shapes: for `comfy.gguf.orig_shape`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "of", "the"])
    writer.add_array("numbers", [1.5, 2.5])
    for name, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (codes, kind) in tensors.items():
        writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
