"""Damage to small valid files, as bytes, as JSON, as safetensors and as GGUF.

Every function takes a source of random choices and returns new bytes. Most of the damage is such that a reader gets
far into the file: one field is wrong and all around it is right.
"""

import copy
import json
import pickle
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from said import gguf_fields

NUMBERS = (
    *(0, 1, -1, 2, 3, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 53, 1 << 62),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200, -(1 << 31), -(1 << 63), 10**9, 999_999_999_999),
    *(0.0, -0.0, 0.5, 1.5, 1e9, 1e30, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
)
NAMES = (
    *("", " ", ".", "..", "/", "/etc/passwd", "~", "a\\b", "c:x"),
    *("\0", "\n", "a\r\nb", "\x1b[2J", "\u202egnp", "\ud800", "\udc80", "é" * 300, "x" * 5000, "x." * 50_000),
    *("__metadata__", "{}", "%s%n", "-1", "1e9", "NaN", "true", "[1]", '{"a":1}', "." * 200, "(a+)+$", ".*.*.*.*x"),
)
OUTSIDE = (b"../", b"../../", b"./", b"x/../../", b"/", b"//", b"..\\\\", b"~/", b"%2e%2e/")
OTHERS = (None, True, False, "", [], {}, [[]], [None], {"": None}, [1, 2], {"a": 1})


class Bomb:
    """Ends the test if anything unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("a pickle was opened",)


STRANGE_FILES = (
    *(b"", b"\0", b"{}", b"[]", b"null", b'"', b"GGUF", b"\xff\xfe{\0}\0", b"\0" * 64, b"PK\x03\x04" + b"\0" * 60),
    *(pickle.dumps(Bomb(), 2), pickle.dumps(Bomb(), 4), pickle.dumps([Bomb()] * 9, 0)),
    *(struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 62) + b"{}", b"\x80\x02\0\0\0\0\0\0{", b"x" * 1_000_000),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
)

# ---- bytes ---------------------------------------------------------------------------------------


def damaged_bytes(pick: Random, raw: bytes, end: int | None = None) -> bytes:
    """Bits and bytes changed, put in, taken out, before `end`; or the file cut off or longer."""
    end = max(1, min(end or len(raw), len(raw)))
    at, size = pick.randrange(end), pick.choice((1, 1, 2, 4, 8, 30))
    noise = bytes(pick.randrange(256) for _ in range(min(size, 8)))
    new = bytearray(raw)
    match pick.randrange(9):
        case 0 | 1 if raw:
            for _ in range(pick.choice((1, 1, 2, 5))):
                new[pick.randrange(end)] ^= 1 << pick.randrange(8)
        case 2:
            new[at : at + len(noise)] = noise
        case 3:
            new[at:at] = noise
        case 4:
            del new[at : at + size]
        case 5:
            del new[at:]
        case 6:
            new += pick.choice((noise, b"\0" * 40_000, raw))
        case 7:
            new[at:at] = new[at : at + size]
        case _:
            new[at : at + size] = b"\0" * len(new[at : at + size])
    return bytes(new)


# ---- JSON ----------------------------------------------------------------------------------------


class Object(list):
    """A JSON object as [name, value] pairs, so that a name can be there twice."""


class Raw(str):
    """JSON as it is to be written."""


DEEP = (
    *(Raw("[" * n + "]" * n) for n in (5, 40, 400, 5000, 200_000)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (5, 40, 400, 5000)),
    Raw("1" * 5000),
    Raw("-0." + "9" * 5000 + "e-9999"),
    Raw("[" + "0," * 50_000 + "0]"),
    Raw("1e99999"),
)


def read_objects(text: bytes | str) -> Any:
    """JSON with every object as an Object."""
    return json.loads(text, object_pairs_hook=lambda pairs: Object([list(pair) for pair in pairs]))


def written(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(name)}:{written(inside)}" for name, inside in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def damaged_value(pick: Random, value: Any, words: Sequence[Any] = ()) -> Any:
    """A parsed JSON value, changed in place in one to three spots; words: what is plausible in place of a text."""
    root = [value]
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        holder, at = root, 0
        while isinstance(inside := holder[at], list) and inside and pick.random() > 0.15:
            if isinstance(inside, Object):
                holder = pick.choice(inside)
                at = 0 if pick.random() < 0.2 else 1
            else:
                holder, at = inside, pick.randrange(len(inside))
        if isinstance(inside, list) and inside and pick.random() < 0.8:
            _damage_items(pick, inside, words)
        else:
            name = isinstance(root[0], Object) and at == 0 and holder is not root
            holder[at] = _name(pick, inside, words) if name and isinstance(inside, str) else _other(pick, inside, words)
    return root[0]


def _damage_items(pick: Random, items: list, words: Sequence[Any]) -> None:
    at = pick.randrange(len(items))
    match pick.randrange(6):
        case 0:
            del items[at]
        case 1:
            items.append(items[at])
        case 2:
            pick.shuffle(items)
        case 3 if isinstance(items, Object):
            name, inside = pick.choice(items)
            items.insert(at, [name, _other(pick, inside, words)])
        case 3:
            items.insert(at, pick.choice(NUMBERS))
        case 4 if isinstance(items, Object):
            other = pick.choice(items)
            items[at][1], other[1] = other[1], items[at][1]
        case 4:
            items *= pick.choice((0, 2, 1000 if len(items) < 100 else 1))
        case _ if isinstance(items, Object):
            items.append([_name(pick, items[at][0], words), items[at][1]])
        case _:
            items.append(copy.deepcopy(pick.choice(OTHERS)))


def _name(pick: Random, name: str, words: Sequence[Any]) -> str:
    texts = [word for word in words if isinstance(word, str)] or [""]
    match pick.randrange(6):
        case 0:
            return pick.choice(NAMES)
        case 1:
            return pick.choice(NAMES) + name
        case 2:
            return name + pick.choice(NAMES) if pick.random() < 0.7 else name[:-1]
        case 3:
            return pick.choice(texts)
        case 4:
            return f"{pick.choice(texts).rpartition('.')[0]}.{name.rpartition('.')[2]}"
        case _:
            return f"{name.rpartition('.')[0]}.{pick.choice(texts).rpartition('.')[2]}"


def _other(pick: Random, value: Any, words: Sequence[Any]) -> Any:
    """Another value: of the same type more often than not."""
    kind = pick.randrange(8)
    if kind == 0:
        return copy.deepcopy(pick.choice((*OTHERS, *DEEP)))
    if isinstance(value, str):
        if value.startswith('{"') and kind < 6 and not isinstance(value, Raw):  # JSON inside JSON
            with suppress(ValueError):
                return written(damaged_value(pick, read_objects(value), words))
        if words and kind < 5:
            return pick.choice(words)
        return pick.choice((*NAMES, *NUMBERS)) if kind < 7 else value + pick.choice(NAMES)
    if isinstance(value, int | float) and not isinstance(value, bool) and kind < 4:
        return pick.choice((value + 1, value - 1, -value, value * 2, value / 2, float(value), str(value), [value]))
    return pick.choice(NUMBERS)


def damaged_json(pick: Random, raw: bytes, words: Sequence[Any] = ()) -> bytes:
    """A JSON file with other values, or with other bytes."""
    if pick.random() < 0.2:
        return damaged_bytes(pick, raw)
    text = written(damaged_value(pick, read_objects(raw), words)).encode(errors="surrogatepass")
    return b"\xef\xbb\xbf" + text if pick.random() < 0.02 else text


# ---- safetensors ---------------------------------------------------------------------------------


def damaged_safetensors(pick: Random, raw: bytes, words: Sequence[str] = ()) -> bytes:
    """The header's JSON or its length changed, or any bytes; words: names of tensors and of dtypes."""
    end = 8 + int.from_bytes(raw[:8], "little")
    how = pick.random()
    if how < 0.1:
        return damaged_bytes(pick, raw)
    if how < 0.25:
        return damaged_bytes(pick, raw, end)
    if how < 0.32:
        length = pick.choice((end - 9, end - 7, end + 8, 0, 1, 2, len(raw), 1 << 27, 1 << 40, 1 << 63, (1 << 64) - 1))
        return struct.pack("<Q", length) + raw[8:]
    header, data = read_objects(raw[8:end]), raw[end:]
    if pick.random() < 0.1:
        data = _other_numbers(pick, header, data)
    if how < 0.42:
        _same_sizes(pick, header)
    elif how < 0.46:
        data = _without(pick, header, data)
    else:
        header = damaged_value(pick, header, words)
    text = written(header).encode(errors="surrogatepass")
    text += b" " * pick.choice((0, 0, -len(text) % 8, 100_000))
    return struct.pack("<Q", len(text)) + text + data


def _entries(header: Object) -> list[dict[str, list]]:
    """Of every tensor {"dtype": ["dtype", value], ...}, to be changed in place."""
    return [{pair[0]: pair for pair in inside} for name, inside in header if name != "__metadata__"]


def _without(pick: Random, header: Object, data: bytes) -> bytes:
    """A file of one tensor less, else whole; the other tensors' bytes."""
    tensors = [item for item in header if item[0] != "__metadata__"]
    gone = pick.choice(tensors)
    begin, end = dict(gone[1])["data_offsets"]
    header.remove(gone)
    for entry in _entries(header):
        offsets = entry["data_offsets"][1]
        entry["data_offsets"][1] = [n - (end - begin) for n in offsets] if offsets[0] >= end else offsets
    return data[:begin] + data[end:]


def _other_numbers(pick: Random, header: Object, data: bytes) -> bytes:
    """One tensor all zeros, NaN or infinities."""
    begin, end = pick.choice(_entries(header))["data_offsets"][1]
    pattern = pick.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\x80\x7f", b"\0\x7c"))
    return data[:begin] + (pattern * (end - begin))[: end - begin] + data[end:]


def _same_sizes(pick: Random, header: Object) -> None:
    """Another file of the same size, often as valid: two tensors change places, or one has another dtype or shape."""
    entries = _entries(header)
    entry = pick.choice(entries)
    word, shape = entry["dtype"][1], entry["shape"][1]
    match pick.randrange(5):
        case 0:
            other = pick.choice([o for o in entries if (o["dtype"][1], o["shape"][1]) == (word, shape)])
            entry["data_offsets"][1], other["data_offsets"][1] = other["data_offsets"][1], entry["data_offsets"][1]
        case 1:
            shape.reverse()
        case 2:
            entry["shape"][1] = pick.choice(([*shape, 1], [1, *shape], [0, 1 << 62], [1 << 32] * 2, [0] * 70))
        case 3:  # twice the numbers, each of half the bytes
            entry["dtype"][1] = {"F64": "F32", "F32": "F16", "F16": "F8_E4M3", "BF16": "F8_E5M2"}.get(word, word)
            entry["shape"][1] = [*shape[:-1], 2 * shape[-1]] if shape else [2]
        case _:
            entry["dtype"][1] = pick.choice(_TWINS.get(word, ("F8_E8M0",)))


_TWINS = {
    "F16": ("BF16", "BF16", "I16", "U16"),
    "BF16": ("F16", "F16", "I16"),
    "F32": ("I32", "U32"),
    "F8_E4M3": ("F8_E5M2", "U8", "I8", "BOOL"),
}


# ---- GGUF ----------------------------------------------------------------------------------------


def damaged_gguf(pick: Random, raw: bytes) -> bytes:
    """A field of the header changed, repeated or taken out, or any bytes."""
    fields, end = gguf_fields(raw)
    if pick.random() < 0.3:
        return damaged_bytes(pick, raw, pick.choice((end, len(raw))))
    parts = [[field.letter, field.value] for field in fields]
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        at = pick.randrange(len(parts))
        letter, value = parts[at]
        match pick.randrange(10):
            case 0:
                del parts[at : at + pick.randrange(1, 8)]
            case 1:
                parts[at:at] = [list(part) for part in parts[at : at + pick.randrange(1, 8)]]
            case _ if letter == "raw":
                new = _name(pick, value.decode(), [f.value.decode() for f in fields if f.letter == "raw"])
                parts[at][1] = new.encode(errors="surrogatepass")
                if pick.random() < 0.8:
                    parts[at - 1] = ["Q", len(parts[at][1])]
            case _:
                near = (value + 1, value - 1, value + 32, value * 2, -value)
                number = pick.choice((*near, *NUMBERS, *range(32)))
                parts[at][1] = number
        if not parts:
            break
    head = b"".join(part[1] if part[0] == "raw" else _packed(*part) for part in parts)
    return head + b"\0" * (-len(head) % 32) + raw[end + -end % 32 :]


def _packed(letter: str, number: float) -> bytes:
    """As much of the number as the field holds."""
    size = struct.calcsize("<" + letter)
    if letter in "fd":
        return struct.pack("<d", number if abs(number) < 1e308 else 0.0)[-size:]
    whole = int(number) if abs(number) < 1e99 else 0  # neither NaN nor infinity
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


# ---- folders -------------------------------------------------------------------------------------


def damaged_files(pick: Random, files: Mapping[str, bytes], words: Sequence[str] = ()) -> dict[str, bytes]:
    """One file of a folder, or the only file, damaged in its own way; or gone, or in another's place, or strange."""
    name = pick.choice(sorted(files))
    raw, how = files[name], pick.random()
    if how < 0.02 and len(files) > 1:
        return {other: content for other, content in files.items() if other != name}
    if how < 0.04:
        return {**files, name: files[pick.choice(sorted(files))]}
    if how < 0.07:
        return {**files, name: pick.choice(STRANGE_FILES)}
    if raw.startswith(b"GGUF"):
        return {**files, name: damaged_gguf(pick, raw)}
    if name.endswith(".index.json") and how < 0.2:
        return {**files, name: raw.replace(b'"diffusion_', b'"' + pick.choice(OUTSIDE) + b"diffusion_")}
    if name.endswith(".json"):
        return {**files, name: damaged_json(pick, raw, words)}
    return {**files, name: damaged_safetensors(pick, raw, words) if raw[8:9] == b"{" else damaged_bytes(pick, raw)}
