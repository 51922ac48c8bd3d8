"""What a safetensors or GGUF file says, read by the tests alone: no line of the readers under test.

Neither reader is hardened: they get files that the readers under test have accepted. What the format forbids is an
AssertionError, so that accepting it is found.
"""

import json
import math
import struct
from functools import lru_cache
from typing import Any, NamedTuple

import gguf
import numpy as np

Numbers = np.ndarray  # float64, flat

_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1",
          "BOOL": "?"}  # fmt: skip
_SIZES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, **{word: np.dtype(code).itemsize for word, code in _PLAIN.items()}}
EXPONENTS = {"F8_E4M3": 4, "F8_E5M2": 5}


class Said(NamedTuple):
    """One tensor: the header's words for it and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def numbers(self) -> Numbers:
        return decoded(self.dtype, self.raw)


# ---- numbers -------------------------------------------------------------------------------------


def fp8_value(code: int, exponent_bits: int) -> float:
    """What a byte stands for: sign, exponent, mantissa; e4m3fn has one NaN and no infinity, e5m2 both as IEEE has."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    sign, bias = -1.0 if code & 128 else 1.0, (1 << exponent_bits - 1) - 1
    if exponent_bits == 4 and code & 127 == 127:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@lru_cache
def _fp8_table(exponent_bits: int) -> Numbers:
    return np.array([fp8_value(code, exponent_bits) for code in range(256)])


def decoded(dtype: str, raw: bytes) -> Numbers:
    """The numbers of a dtype's bytes."""
    if dtype in EXPONENTS:
        return _fp8_table(EXPONENTS[dtype])[np.frombuffer(raw, np.uint8)]
    with np.errstate(all="ignore"):  # a signalling NaN
        if dtype == "BF16":
            return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        return np.frombuffer(raw, _PLAIN[dtype]).astype(np.float64)


# ---- safetensors ---------------------------------------------------------------------------------


def safetensors_said(raw: bytes) -> tuple[dict[str, Said], Any]:
    """{name: Said} and the metadata of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    pairs = json.loads(raw[8:end], object_pairs_hook=lambda pairs: pairs)
    entries = {name: entry if name == "__metadata__" else dict(entry) for name, entry in pairs}
    assert len(entries) == len(pairs), "a name is there twice"
    metadata = entries.pop("__metadata__", [])
    tensors, places = {}, []
    for name, entry in entries.items():
        assert set(entry) >= {"dtype", "shape", "data_offsets"}
        begin, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        assert all(type(n) is int and n >= 0 for n in (*shape, begin, stop))
        assert stop - begin == math.prod(shape) * _SIZES.get(entry["dtype"], (stop - begin) // max(1, math.prod(shape)))
        places.append((begin, stop))
        tensors[name] = Said(entry["dtype"], shape, raw[end + begin : end + stop])
    at = 0
    for begin, stop in sorted(places):
        assert begin == at, "a hole, or two tensors in one place"
        at = stop
    assert end + at == len(raw)
    return tensors, metadata


# ---- GGUF ----------------------------------------------------------------------------------------

_LETTERS = "BbHhIif?s.Qqd"  # of GGUF's types of values; s: a text, .: an array


class Field(NamedTuple):
    """One number of a header, or the bytes ("raw") of a text."""

    letter: str
    value: Any


class _Header:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at, self.fields = raw, 0, []

    def number(self, letter: str) -> Any:
        letter = letter.replace("?", "B")
        (value,) = struct.unpack_from("<" + letter, self.raw, self.at)
        self.at += struct.calcsize("<" + letter)
        self.fields.append(Field(letter, value))
        return value

    def text(self, length: int | None = None) -> bytes:
        length = self.number("Q") if length is None else length
        value = self.raw[self.at : self.at + length]
        assert len(value) == length
        self.at += length
        self.fields.append(Field("raw", value))
        return value

    def value(self, kind: int) -> Any:
        letter = _LETTERS[kind]
        if letter == ".":
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.text() if letter == "s" else self.number(letter)


def _read_gguf(raw: bytes) -> tuple[_Header, dict[bytes, Any], list[tuple[bytes, list[int], int, int]]]:
    header = _Header(raw)
    assert header.text(4) == b"GGUF"
    header.number("I")
    count, pairs = header.number("Q"), header.number("Q")
    values = [(header.text(), header.value(header.number("I"))) for _ in range(pairs)]
    tensors = []
    for _ in range(count):
        name, dimensions = header.text(), header.number("I")
        shape = [header.number("Q") for _ in range(dimensions)][::-1]
        tensors.append((name, shape, header.number("I"), header.number("Q")))
    return header, dict(values), tensors


def gguf_fields(raw: bytes) -> tuple[list[Field], int]:
    """All fields of a header, and where it ends."""
    header = _read_gguf(raw)[0]
    return header.fields, header.at


def gguf_said(raw: bytes) -> dict[str, tuple[tuple[int, ...], Numbers]]:
    """{name: (shape, numbers)}, decoded by the package `gguf`."""
    header, values, tensors = _read_gguf(raw)
    alignment = values.get(b"general.alignment") or 32
    start, end, said = header.at + -header.at % alignment, 0, {}
    for name, shape, kind, offset in tensors:
        assert offset == end
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        length = math.prod(shape) // block * size
        codes = np.frombuffer(raw, np.uint8, length, start + offset)
        end = offset + length + -length % alignment
        original = values.get(b"comfy.gguf.orig_shape." + name)
        word = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}.get(kind)
        with np.errstate(all="ignore"):
            flat = decoded(word, codes.tobytes()) if word else gguf.quants.dequantize(codes, kind).astype(np.float64)
        assert name.decode() not in said
        said[name.decode()] = tuple(original or shape), flat
    return said
