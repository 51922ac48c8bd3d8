"""What differs from device to device: which one is meant, what is free of its memory, and how memory goes back."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from mmdit.memory.host import available_bytes, own_bytes


def indexed(device: torch.device) -> torch.device:
    """The device by its number, as tensors there have it.

    "cuda" is not equal to "cuda:0", and means another one as soon as a thread has another current device.
    """
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device() if device.type == "cuda" else 0)


def taken_bytes(device: torch.device) -> int:
    """What this process has on the device already."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return own_bytes() if device.type == "cpu" else 0


def free_bytes(device: torch.device) -> int:
    """What this process may take of the device without harm to others, what it has there already included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    available = available_bytes()
    if device.type == "mps":  # its memory is the host's
        most = torch.mps.recommended_max_memory()
        return most if available is None else min(most, available + torch.mps.driver_allocated_memory())
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available + own_bytes()


def give_back(device: torch.device) -> None:
    """Return what was freed on the device to the system: the next network's memory is of other sizes."""
    if device.type == "cpu":
        trim()
    elif device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def trim() -> None:
    """Return the host's freed memory: glibc keeps what is not at the end of its heap, some hundred megabytes."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def unlock(device: torch.device) -> None:
    """Return page-locked memory that nobody uses to the system: PyTorch would keep all that it ever had.

    device: the GPU whose copies may have been the last to use it.
    """
    with suppress(AttributeError, RuntimeError):  # another version of PyTorch; a GPU that has failed
        torch.cuda.synchronize(device)  # what was freed a moment ago is still taken for used by copies otherwise
        torch._C._host_emptyCache()


def locked_bytes(size: int) -> int:
    """What so many page-locked bytes take: PyTorch rounds them up to a power of two."""
    return 1 << max(size - 1, 0).bit_length()


def lockable_bytes(held: int = 0) -> int:
    """What may be page-locked of the host's memory: half of what is free, for the system cannot take it back.

    held: bytes that are page-locked already and count as free.
    """
    available = available_bytes()
    return sys.maxsize if available is None else (available + held) // 2
