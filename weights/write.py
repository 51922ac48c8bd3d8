"""Safetensors files written tensor by tensor, and outputs that are there whole or not at all.

Format: see `header`. The header is written first, from names, dtypes and shapes alone; then one tensor after another
goes to its place, so that a file of any size needs the memory of one tensor.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.common.files import beside, put_new, sweep
from weights.errors import CheckpointError
from weights.header import DTYPES

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Item(NamedTuple):
    """One tensor of a file to be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, items: Sequence[Item], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, which come in the order of `items` and are as these say; OSError where the disk refuses."""
    # Wide numbers first, as the safetensors library does it: readers want every tensor aligned to its dtype.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for item in sorted(items, key=lambda item: -item.dtype.itemsize):
        begin, end = end, end + item.bytes
        header[item.name] = {"dtype": _WORDS[item.dtype], "shape": list(item.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        start = file.tell()
        for item, tensor in zip(items, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (item.dtype, item.shape), item.name
            file.seek(start + header[item.name]["data_offsets"][0])
            if tensor.numel():
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def whole(out: Path, size: int) -> Iterator[Path]:
    """A place to write a file or folder of about `size` bytes to.

    What stands there when all went well becomes `out`; else nothing remains, folders made on the way included. Raises
    CheckpointError where something is at `out` already, and where the disk has no room or does not take it.
    """
    taken = CheckpointError(f"{out}: is there already: expected a new name")
    try:
        if out.exists() or out.is_symlink():
            raise taken
        with beside(out) as written:
            sweep(out.parent)
            free = shutil.disk_usage(out.parent).free
            if size > free:
                raise CheckpointError(f"{out}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
            yield written
            if not put_new(written, out):
                raise taken
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
