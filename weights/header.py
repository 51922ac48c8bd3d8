"""Safetensors headers, read and checked before anything else touches the file.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, tensor bytes.
Reference: the safetensors README (huggingface/safetensors), section "Format".
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdit.common.jsons import parse_json
from weights.errors import CheckpointError

# The limit of the safetensors library itself; a larger header is an attack or not a header.
MAX_HEADER_BYTES = 100_000_000
# Far above what any published model has.
MAX_TENSORS = 100_000
MAX_NAME = 1000  # characters
MAX_DIMENSIONS = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Where one tensor lies: its file, its name there, the header's dtype word and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    scale: "TensorInfo | None" = None  # of an fp8 weight: the number that it is multiplied by


class Header(NamedTuple):
    """What a file says of itself before its tensors."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """{name: TensorInfo} of a safetensors file, as `read_safetensors`."""
    return read_safetensors(path).tensors


def read_safetensors(path: Path) -> Header:
    """Tensors and metadata of a safetensors file, reading only its header.

    Raises CheckpointError for a file that is missing, truncated, or in another format. Pickles are refused
    by their first bytes and never opened.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(9)
            _refuse_other_formats(path, start, size)
            length = int.from_bytes(start[:8], "little")
            _check_header_length(path, length, size)
            raw = start[8:] + file.read(length - 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse(path, raw, size)


def check_regular(path: Path) -> None:
    """Raise CheckpointError where there is no file to read: opening a pipe, for one, would wait for ever."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; expected a .safetensors file")


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    if start[8:] == b"{":
        return
    if start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise CheckpointError(f"{path}: a pickle checkpoint (.ckpt/.pt/.bin); pickles are never opened, "
                              "because they can run code: use a .safetensors file")  # fmt: skip
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: a GGUF file where a .safetensors file belongs")
    if start.startswith(b"version "):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: fetch the real file (git lfs pull)")
    if size < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {size} bytes, even an empty one has 10")
    raise CheckpointError(f"{path}: not a safetensors file: no header after the first 8 bytes")


def _check_header_length(path: Path, length: int, size: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: not a safetensors file: claims a header of {length} bytes "
                              f"(at most {MAX_HEADER_BYTES})")  # fmt: skip
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated: header alone promises {8 + length} bytes, file has {size}")


def _parse(path: Path, raw: bytes, size: int) -> Header:
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: the header is not JSON ({error})") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: broken safetensors header: __metadata__ is not {{name: text}}")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: broken safetensors header: {len(header)} tensors, at most {MAX_TENSORS}")
    infos, places = {}, []
    for key, entry in header.items():
        infos[key], place = _parse_entry(path, key, entry)
        places.append((*place, key))
    end = _packed(path, places)
    promised = 8 + len(raw) + end
    if size != promised:
        what = "truncated" if size < promised else "bytes after the last tensor"
        raise CheckpointError(f"{path}: {what}: header promises {promised} bytes, file has {size}")
    return Header(infos, metadata)


def _parse_entry(path: Path, key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        sane = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) and begin <= end
        sane = sane and len(shape) <= MAX_DIMENSIONS and max(len(key), len(dtype)) <= MAX_NAME
        if sane and dtype in DTYPES:
            sane = end - begin == math.prod(shape) * DTYPES[dtype].itemsize
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{path}: broken safetensors header: bad entry for {key}")
    return TensorInfo(path, key, dtype, shape), (begin, end)


def _packed(path: Path, places: list[tuple[int, int, str]]) -> int:
    """Where the last tensor ends; CheckpointError where two share bytes, or bytes between them belong to none."""
    at = 0
    for begin, end, key in sorted(places):
        if begin != at:
            raise CheckpointError(f"{path}: broken safetensors header: {key} begins at {begin}, expected {at}")
        at = end
    return at
