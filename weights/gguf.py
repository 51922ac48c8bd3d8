"""GGUF files: headers read and checked here, blocks of quantised weights decoded by the package `gguf`.

Format: "GGUF", version, numbers of tensors and of key-value pairs, the pairs, for each tensor its name, dimensions
(innermost first), type and offset, then the tensors, each at a multiple of the alignment, one after the other.
Reference: ggml's docs/gguf.md. The header is read here because the package's own reader trusts every length in it, and
a damaged file then costs hours and all memory.
"""

import math
import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from weights.errors import CheckpointError
from weights.header import DTYPES, MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, TensorInfo

_VERSIONS = (2, 3)
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that the converter reshaped, by its name
_MAX_TEXTS = 1_000_000  # of an array; vocabularies have up to 256,000
_CHUNK = 1 << 22  # numbers decoded at a time

# Types of values in the key-value pairs, as struct's letters; 8 is a text, 9 an array.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

# ggml types that are number formats of torch too: views, not decoded.
_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}


class _Place(NamedTuple):
    """Where and how one tensor lies in the file."""

    begin: int
    type: int
    rows: int
    columns: int
    bytes: int


class GGUFFile:
    """The tensors of a GGUF file.

    tensors: {name: TensorInfo} with shapes as torch has them and the dtype that `get_tensor` returns: the file's own
    for F32, F16, BF16 and F64, F32 for everything that is decoded. stored: {name: (ggml's name of the type that lies in
    the file, bytes there)}; metadata: the key-value pairs that are no arrays.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        CheckpointError where it is damaged, for a type that cannot be decoded, and without the package `gguf`.
        """
        self.path = path
        with path.open("rb") as file:
            # A private mapping: torch wants memory that could be written to, and the file stays as it is.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _package(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.stored: dict[str, tuple[str, int]] = {}
        self.metadata: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        cursor = _Cursor(path, self._data)
        try:
            self._read(cursor)
        except struct.error:
            raise CheckpointError(f"{path}: truncated: the header goes on after byte {len(self._data)}") from None

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name: a view of the mapped file, or decoded into float32."""
        info, place = self.tensors[name], self._places[name]
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        if place.type in _PLAIN:
            flat = torch.frombuffer(self._data, dtype=DTYPES[info.dtype], count=count, offset=place.begin)
            return flat.reshape(info.shape)
        codes = np.frombuffer(self._data, np.uint8, place.bytes, place.begin).reshape(place.rows, -1)
        values = torch.empty(place.rows, place.columns)
        step = max(1, _CHUNK // place.columns)
        for row in range(0, place.rows, step):
            values[row : row + step] = torch.from_numpy(_dequantize(codes[row : row + step], place.type))
        return values.reshape(info.shape)

    def _read(self, cursor: "_Cursor") -> None:
        cursor.at = 4
        version = cursor.number("I")
        if version not in _VERSIONS:
            hint = " (a big-endian file?)" if version % 65536 == 0 else ""
            raise CheckpointError(f"{self.path}: GGUF version {version}{hint}; known are 2 and 3, little-endian")
        count, pairs = cursor.number("Q"), cursor.number("Q")
        if max(count, pairs) > MAX_TENSORS:
            raise CheckpointError(f"{self.path}: {count} tensors, {pairs} keys: at most {MAX_TENSORS} of each are read")
        values = dict(cursor.pair() for _ in cursor.counted(pairs, 12))
        self.metadata = {
            key: value for key, value in values.items() if value is not None and not isinstance(value, list)
        }
        alignment = values.get("general.alignment") or 32
        if not isinstance(alignment, int) or alignment % 8 or not 0 < alignment <= 1 << 20:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}: expected a multiple of 8")
        found = [cursor.tensor() for _ in cursor.counted(count, 24)]
        start, end = _aligned(cursor.at, alignment), 0
        for name, shape, kind, offset in found:
            where = f"{self.path}: {name}"
            if name in self.tensors:
                raise CheckpointError(f"{where} is there twice")
            if offset != end:
                raise CheckpointError(f"{where}: begins at {offset}, expected {end}: the header is damaged")
            place = _place(where, start + offset, shape, kind)
            end = _aligned(offset + place.bytes, alignment)
            if place.begin + place.bytes > len(self._data):
                promised = place.begin + place.bytes
                raise CheckpointError(
                    f"{self.path}: truncated: {name} ends at byte {promised}, file has {len(self._data)}"
                )
            shape = _original_shape(where, shape, values.get(_ORIGINAL_SHAPE + name))
            self._places[name] = place
            self.stored[name] = (_type(where, kind)[0], place.bytes)
            self.tensors[name] = TensorInfo(self.path, name, _PLAIN.get(kind, "F32"), shape)


class _Cursor:
    """Reads the header from front to back; nothing it reads makes it allocate more than the file holds."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def number(self, letter: str) -> Any:
        """One little-endian number; struct.error at the end of the file."""
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def counted(self, count: int, smallest: int) -> range:
        """range(count), where so many items of at least `smallest` bytes can still come."""
        if count * smallest > len(self.data) - self.at:
            raise struct.error
        return range(count)

    def text(self) -> str:
        length = self.number("Q")
        self.counted(length, 1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: damaged GGUF header: a text is not UTF-8") from None

    def name(self) -> str:
        name = self.text()
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{self.path}: damaged GGUF header: a name of {len(name)} characters")
        return name

    def pair(self) -> tuple[str, Any]:
        """A key and its value, which is None where nothing here needs it."""
        key, kind = self.name(), self.number("I")
        if kind == _ARRAY:
            return key, self.array(keep=key.startswith(_ORIGINAL_SHAPE))
        return key, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind not in _LETTERS:
            raise CheckpointError(f"{self.path}: damaged GGUF header: a value of the unknown type {kind}")
        return self.number(_LETTERS[kind])

    def array(self, keep: bool) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:  # vocabularies: read past
            if count > _MAX_TEXTS:
                raise CheckpointError(f"{self.path}: an array of {count} texts, at most {_MAX_TEXTS} are read")
            for _ in self.counted(count, 8):
                length = self.number("Q")
                self.counted(length, 1)
                self.at += length
            return None
        if keep and count <= MAX_DIMENSIONS:
            return [self.value(kind) for _ in range(count)]
        size = struct.calcsize("<" + _LETTERS[kind]) if kind in _LETTERS else None
        if size is None:
            raise CheckpointError(f"{self.path}: damaged GGUF header: an array of the unknown type {kind}")
        self.counted(count, size)
        self.at += count * size
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, torch's shape, ggml's type and the offset of one tensor."""
        name, dimensions = self.name(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name}: {dimensions} dimensions: the header is damaged")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _place(where: str, begin: int, shape: tuple[int, ...], kind: int) -> _Place:
    name, block, size = _type(where, kind)
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    if columns % block:
        raise CheckpointError(
            f"{where}: {name} comes in blocks of {block}, a row of {columns} does not divide into them"
        )
    return _Place(begin, kind, rows, columns, rows * columns // block * size)


def _original_shape(where: str, shape: tuple[int, ...], original: Any) -> tuple[int, ...]:
    if original is None:
        return shape
    sane = isinstance(original, list) and all(isinstance(n, int) and n >= 0 for n in original)
    if not sane or math.prod(original) != math.prod(shape):
        raise CheckpointError(f"{where}: has the shape {list(shape)}, which cannot come from {original!r}")
    return tuple(original)


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: a GGUF file, which needs the package gguf: pip install 'mmdit[gguf]'") from None
    return gguf


def _type(where: str, kind: int) -> tuple[str, int, int]:
    """Name, numbers per block and bytes per block of a ggml type; CheckpointError where it cannot be decoded."""
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        if kind not in _PLAIN:
            _try_block(kind, size)
    except (ValueError, KeyError):
        raise CheckpointError(f"{where}: of the unknown GGUF type {kind}") from None
    except NotImplementedError:
        raise CheckpointError(f"{where}: {known.name} is a GGUF type that cannot be decoded") from None
    return known.name, block, size


@lru_cache
def _try_block(kind: int, size: int) -> None:
    """Raise NotImplementedError where the package cannot decode this type; it has no list to ask."""
    _dequantize(np.zeros((1, size), np.uint8), kind)


def _dequantize(codes: np.ndarray, kind: int) -> np.ndarray:
    """uint8 (rows, bytes per row) to float32 (rows, columns)."""
    import gguf

    with np.errstate(all="ignore"):  # the scale of a block may be infinite or NaN: the values then are, too
        return gguf.quants.dequantize(codes, gguf.GGMLQuantizationType(kind))
