"""Textual inversions: files of vectors that stand for a word, in the forms that trainers write.

clip_l, clip_g              (n, width) each, one or both: kohya's and ComfyUI's for models of two CLIPs
emb_params                  (n, width) or (width,), of the CLIP that is so wide: AUTOMATIC1111's
one tensor of any name      the same: diffusers', whose name is the token that was trained
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.errors import CheckpointError
from weights.files import open_file
from weights.header import TensorInfo, read_header

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_embedding(path: Path, widths: Mapping[str, int], most: int) -> dict[str, Tensor]:
    """The vectors `(n, width)`, float32, of a safetensors file for one or both CLIPs.

    widths: of the CLIPs that the model has, "clip_l" before "clip_g". most: vectors that a prompt has room for. Raises
    CheckpointError, which names the tensor, for any other file, for vectors of another width, and for NaN or infinity.
    """
    tensors = read_header(path)
    found: dict[str, Tensor] = {}
    for name, info in _owners(path, tensors, widths).items():
        _check(path, info, most)
        vectors = open_file(path).get_tensor(info.key).float()
        if not bool(torch.isfinite(vectors).all()):
            raise CheckpointError(f"{path}: {info.key}: NaN or infinity")
        found[name] = vectors.reshape(-1, vectors.shape[-1])
    return found


def _owners(path: Path, tensors: Mapping[str, TensorInfo], widths: Mapping[str, int]) -> dict[str, TensorInfo]:
    """Which of the tensors is for which CLIP."""
    if tensors and tensors.keys() <= {"clip_l", "clip_g"}:
        for name, info in tensors.items():
            if name not in widths:
                raise CheckpointError(f"{path}: {name}: the model has no {name}")
            if _width(info) != widths[name]:
                raise CheckpointError(
                    f"{path}: {name}: vectors of {_width(info)}, the model's {name} has {widths[name]}"
                )
        return {name: tensors[name] for name in widths if name in tensors}
    if len(tensors) != 1:
        told = ", ".join(list(tensors)[:5]) or "nothing"
        raise CheckpointError(
            f"{path}: no textual inversion: it holds {told:.200}; expected clip_l, clip_g, or a single tensor"
        )
    ((key, info),) = tensors.items()
    fits = [name for name, width in widths.items() if width == _width(info)]
    if not fits:
        known = " and ".join(f"the model's {name} has {width}" for name, width in widths.items())
        raise CheckpointError(f"{path}: {key}: vectors of {_width(info)}, {known}")
    return dict.fromkeys(fits, info)


def _width(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 0


def _check(path: Path, info: TensorInfo, most: int) -> None:
    if info.dtype not in _FLOATS:
        raise CheckpointError(f"{path}: {info.key} is {info.dtype}; vectors must be one of {', '.join(_FLOATS)}")
    if len(info.shape) not in (1, 2):
        raise CheckpointError(f"{path}: {info.key}: shape {info.shape}, expected (n, width) or (width,)")
    count = info.shape[0] if len(info.shape) == 2 else 1
    if not 1 <= count <= most:
        raise CheckpointError(f"{path}: {info.key}: {count} vectors, expected 1 to {most}")
