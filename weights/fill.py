"""Putting a component's tensors into a module, strictly: all names and shapes fit, nothing is left over."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from weights.component import Component
from weights.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)

_SHOWN = 10


def fill(
    module: Module,
    component: Component,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Module:
    """Fill a module built under `torch.device("meta")`; returns it frozen (no gradients) and in eval mode.

    dtype, device: what each tensor is converted to; None keeps the file's dtype. progress is called after
    each tensor with its size in bytes as it now lies in memory.

    Conversion goes tensor by tensor, so the model never exists twice. A tensor that needs none is a view of
    the mapped file (in float32 only where it is aligned): it occupies no memory of its own, and it must not be
    written to (copy it first).

    Raises CheckpointError, before any tensor is read, if names or shapes differ from the module's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check(module, component, wanted)
    tensors: dict[str, torch.Tensor] = {}
    for name in wanted:
        tensor = aligned(component.read(name).to(device=device, dtype=dtype))
        tensors[name] = tensor
        if progress is not None:
            progress(tensor.nbytes)
    module.load_state_dict(tensors, strict=True, assign=True)
    # A buffer outside the state dict cannot come from a file: its module has to make it without "meta".
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not empty, f"buffers without values after filling: {empty}"
    return module.requires_grad_(False).eval()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is float32 on the CPU and does not begin at a cache line.

    Float32 matrix products there round differently by how their operands lie in memory, and the same weights in two
    files would give two pictures.
    """
    misplaced = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.data_ptr() % 64
    return tensor.clone() if misplaced else tensor


def _check(module: nn.Module, component: Component, wanted: dict[str, tuple[int, ...]]) -> None:
    found = component.shapes
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    wrong = [
        f"{name} {list(found[name])} should be {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or wrong:
        groups = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        told = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in groups if names)
        model = type(module).__name__
        raise CheckpointError(f"{component.path}: {component.name} does not fit this {model}: {told}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
