"""One network's tensors inside a checkpoint: names, shapes and dtypes known, values read on demand."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from weights.errors import CheckpointError
from weights.files import open_file
from weights.header import DTYPES, TensorInfo
from weights.keymap import TABLES, VIEWS, Entry, convert, converted_shape, to_diffusers
from weights.quantised import FP8, decode, decoded_dtype

_FLOATS = ("F64", "F32", "F16", "BF16", *FP8)


class Component:
    """The tensors of one network ("transformer", "vae", "clip_l", "clip_g" or "t5") under native names.

    name: which network; path: file or folder it comes from, for messages; config: its config.json or None;
    shapes, dtypes: of every tensor `read` can return, known from the headers alone.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        entries: Mapping[str, Entry],
        config: dict[str, Any] | None = None,
        layout: str = "native",
        prefix: str = "",
    ) -> None:
        """`entries`: how each native name is made from `tensors`; CheckpointError if one cannot be used.

        layout, prefix: how names are spelled in the file (see `layouts`).
        """
        self.name = name
        self.path = path
        self.config = config
        self._tensors = tensors
        self._entries = entries
        self._layout, self._prefix = layout, prefix
        self._files: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for native, entry in entries.items():
            infos = [tensors[source] for source in entry.sources]
            self.dtypes[native] = _common_dtype(infos)
            try:
                self.shapes[native] = converted_shape(entry.op, [info.shape for info in infos])
            except ValueError as error:
                raise CheckpointError(f"{path}: {name}: {self.spelled(native)}: {error}") from None

    @property
    def files(self) -> list[Path]:
        """Where its tensors lie."""
        return sorted({info.file for info in self._tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this native name, on the CPU, in the dtype of the file.

        What a file stores as codes comes in a dtype that holds every decoded number: plain fp8 in float16, scaled
        fp8 and GGUF's blocks in float32. It is a view of the mapped file unless it had to be decoded or the two
        layouts store it differently (then a new tensor): do not write to it. KeyError for an unknown name;
        CheckpointError if the file went bad since it was opened.
        """
        entry = self._entries[name]
        parts = [self._raw(self._tensors[source]) for source in entry.sources]
        return convert(entry.op, parts, entry.part)

    def spelled(self, native: str, others: Iterable[str] = ()) -> str:
        """A tensor's name in the file, or that it should have there, with the native one where they differ.

        others: native names that the file should have too, as some names depend on the number of layers.
        """
        if native in self._entries:
            keys = [self._tensors[source].key for source in self._entries[native].sources]
        elif self._layout == "diffusers" and self.name in TABLES:
            table = to_diffusers([*others, native], TABLES[self.name])
            keys = [key for key, entry in table.items() if native in entry.sources and key not in self._tensors]
        else:
            keys = [self._prefix + native]
        told = " + ".join(keys)
        return told if told.endswith(native) else f"{told} (here {native})"

    def is_stored(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the file has this tensor just so, and `read` gives a view of it."""
        entry = self._entries[name]
        return entry.op in VIEWS and all(DTYPES.get(self._tensors[source].dtype) == dtype for source in entry.sources)

    def _raw(self, info: TensorInfo) -> torch.Tensor:
        stored = self._stored(info)
        if info.dtype not in FP8:
            return stored
        return decode(info, stored, None if info.scale is None else self._stored(info.scale))

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        try:
            if info.file not in self._files:
                self._files[info.file] = open_file(info.file)
            return self._files[info.file].get_tensor(info.key)
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{info.file}: {info.key} cannot be read: {error}") from error


def _common_dtype(infos: list[TensorInfo]) -> torch.dtype:
    for info in infos:
        if info.dtype not in _FLOATS:
            words = ", ".join(_FLOATS)
            raise CheckpointError(f"{info.file}: {info.key} is {info.dtype}; weights must be one of {words}")
    dtype = _dtype(infos[0])
    for info in infos[1:]:
        dtype = torch.promote_types(dtype, _dtype(info))
    return dtype


def _dtype(info: TensorInfo) -> torch.dtype:
    return decoded_dtype(info) if info.dtype in FP8 else DTYPES[info.dtype]
