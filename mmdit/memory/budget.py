"""What may be used of a device's memory, and the error where that does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmdit.memory.devices import free_bytes
from mmdit.memory.options import memory_bytes

_SHARE = 0.9  # of what is free: the rest is for what allocators waste
_LIBRARY = 500_000_000  # bytes on a GPU that kernels and libraries may still take when they are first used
_LIBRARIES = ("ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")  # cuBLAS and cuDNN out of memory
_PLAIN = ("out of memory", "not enough memory", "can't allocate memory")


class DeviceMemoryError(ValueError):
    """The device's memory does not suffice; the message names the stage and what to try."""


_processes = 1  # that use this host's memory together


@contextmanager
def shared_by(processes: int) -> Iterator[None]:
    """Meanwhile so many processes compute on this machine's CPU, and each takes its share of what is free there."""
    global _processes
    before, _processes = _processes, processes
    try:
        yield
    finally:
        _processes = before


def budget_of(memory: str, device: torch.device) -> int:
    """Bytes that `--memory` allows; of "auto" most of what is free on the device. SettingsError for what is no size."""
    given = memory_bytes(memory)
    if given is not None:
        return given
    free = free_bytes(device)
    return (
        max(0, min(int(_SHARE * free), free - _LIBRARY)) if device.type == "cuda" else int(_SHARE * free) // _processes
    )


@contextmanager
def memory_errors(stage: str) -> Iterator[None]:
    """Turn running out of memory, the device's or the host's, into a DeviceMemoryError that names the stage."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not ours and not any(word in str(error) for word in (*_PLAIN, *_LIBRARIES)):
            raise
        tries = "--quantise int8, --t5 off, a smaller picture, or --device cpu"
        said = f" ({str(error).splitlines()[0]})" if any(word in str(error) for word in _LIBRARIES) else ""
        raise DeviceMemoryError(f"{stage}: the device's memory does not suffice{said}; try {tries}") from None
