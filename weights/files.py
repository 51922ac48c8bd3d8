"""Checkpoint files, safetensors or GGUF, told apart by their first bytes and not by their names."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from weights.errors import CheckpointError
from weights.gguf import GGUFFile
from weights.header import Header, check_regular, read_safetensors


def read_file(path: Path) -> Header:
    """What the file holds; reads no tensor. CheckpointError where it is missing, damaged or of another format."""
    if is_gguf(path):
        return Header(GGUFFile(path).tensors, {})
    return read_safetensors(path)


def open_file(path: Path) -> Any:
    """An object whose `get_tensor(key)` gives a tensor on the CPU, where it can a view of the mapped file."""
    return GGUFFile(path) if is_gguf(path) else safe_open(str(path), framework="pt", device="cpu")


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do; CheckpointError where there is no file to read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
