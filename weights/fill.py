"""Putting a component's tensors into a module, strictly: all names and shapes fit, nothing is left over."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from weights.component import Component
from weights.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)

_SHOWN = 5


class Source:
    """The tensors of a network as they are to be computed with, read when they are asked for.

    shapes: of all of them by name. Raises CheckpointError, before any tensor is read, if names or shapes differ from
    the module's.
    """

    def __init__(self, module: nn.Module, component: Component, dtype: torch.dtype | None = None) -> None:
        """module: what they are for, filled or on "meta". dtype: what each is converted to; None keeps the file's."""
        self.shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        _check(type(module).__name__, component, self.shapes)
        self._component, self._dtype = component, dtype
        self._put: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """The tensor on the CPU: what was put in its place, else the original."""
        return self._put[name] if name in self._put else self.original(name)

    def original(self, name: str) -> Tensor:
        """The file's tensor, on the CPU.

        Where nothing has to be done to it, it is a view of the mapped file (in float32 only where that is aligned): it
        occupies no memory of its own, and it must not be written to (copy it first).
        """
        return aligned(self._component.read(name).to(self.dtype(name)))

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Put another tensor, on the CPU, in the place of the file's; None: the file's again."""
        self._put.pop(name, None)
        if tensor is not None:
            self._put[name] = tensor

    def is_put(self, name: str) -> bool:
        """Whether the tensor is another than the file's."""
        return name in self._put

    @property
    def put_bytes(self) -> int:
        """The size of all that was put in the places of the file's tensors."""
        return sum(tensor.nbytes for tensor in self._put.values())

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._component.dtypes[name]

    def nbytes(self, name: str) -> int:
        """The tensor's size as it is computed with."""
        return math.prod(self.shapes[name]) * self.dtype(name).itemsize

    def is_mapped(self, name: str) -> bool:
        """Whether the tensor takes no memory but the file's, which the system can drop and read again."""
        dtype = self.dtype(name)
        return name not in self._put and dtype != torch.float32 and self._component.is_stored(name, dtype)


def fill(
    module: Module,
    component: Component,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Module:
    """Fill a module built under `torch.device("meta")`; returns it frozen (no gradients) and in eval mode.

    dtype, device: what each tensor is converted to; None keeps the file's dtype. Conversion goes tensor by tensor, so
    the model never exists twice; what needs none stays a view of the file (`Source.original`).

    Raises CheckpointError, before any tensor is read, if names or shapes differ from the module's.
    """
    source = Source(module, component, dtype)
    module.load_state_dict({name: source(name).to(device) for name in source.shapes}, strict=True, assign=True)
    # A buffer outside the state dict cannot come from a file: its module has to make it without "meta".
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not empty, f"buffers without values after filling: {empty}"
    return module.requires_grad_(False).eval()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is float32 on the CPU and does not begin at a cache line.

    Float32 matrix products there round differently by how their operands lie in memory, and the same weights in two
    files would give two pictures.
    """
    misplaced = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.data_ptr() % 64
    return tensor.clone() if misplaced else tensor


def _check(model: str, component: Component, wanted: dict[str, tuple[int, ...]]) -> None:
    found = component.shapes
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    wrong = [name for name, shape in wanted.items() if name in found and found[name] != shape]

    def told(what: str, names: Sequence[str], shapes: bool = False) -> str:
        first = [component.spelled(name, wanted) for name in names[:_SHOWN]]
        if shapes:
            first = [f"{text} {list(found[n])} should be {list(wanted[n])}" for text, n in zip(first, names)]
        return f"{len(names)} {what}: {', '.join(first)}{', ...' if len(names) > _SHOWN else ''}"

    groups = (told("missing", missing), told("unexpected", unexpected), told("of the wrong shape", wrong, shapes=True))
    strange = "; ".join(text for text, names in zip(groups, (missing, unexpected, wrong)) if names)
    if strange:
        raise CheckpointError(f"{component.path}: {component.name} does not fit this {model}: {strange}")
