"""For CUDA: weights out of page-locked memory of the host, copied by a queue of their own while another computes.

A thread writes a unit's weights into page-locked memory, out of the mapped file and with whatever conversion they need.
Those of units that run in rounds stay there, if the host has room for all of them, from visit to visit.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mmdit.memory.devices import indexed, lockable_bytes, locked_bytes, unlock
from weights import Source

Tensors = dict[str, Tensor]
Names = tuple[str, ...]
Parts = list[tuple[str, int, torch.dtype, tuple[int, ...]]]  # name, first byte, dtype and shape of each tensor
_ALIGNMENT = 256  # bytes, as the GPU's own allocator aligns


class Pages:
    """Page-locked memory of units that run in rounds: each has its own, so that it is read once.

    It outlives the carrier that fills it, and is one carrier's at a time.
    """

    def __init__(self, device: torch.device) -> None:
        """device: the GPU that copies out of it."""
        self.memory: dict[Names, Tensor] = {}
        self.read: set[Names] = set()  # units of which all tensors are there
        self._device, self._taken = device, False

    @property
    def locked(self) -> int:
        """The bytes that are page-locked for it."""
        return sum(locked_bytes(memory.nbytes) for memory in self.memory.values())

    def take(self) -> None:
        assert not self._taken, "two carriers would write into the same memory"
        self._taken = True

    def release(self) -> None:
        """Called when no copy out of it is on its way."""
        self._taken = False

    def hold(self, sizes: dict[Names, int]) -> bool:
        """Have memory for these units and no others; False, and none, where the host has too little for all of them."""
        if self.memory.keys() == sizes.keys():
            return True
        self._free()
        if sum(map(locked_bytes, sizes.values())) > lockable_bytes():
            return False
        try:
            for unit, size in sizes.items():
                self.memory[unit] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            self._free()  # or the two places would not find room either
            tell_slow()
            return False
        return True

    def forget(self, name: str) -> None:
        """Read the unit of this tensor anew when it comes next."""
        self.read = {unit for unit in self.read if name not in unit}

    def drop(self) -> None:
        """Give the memory back to the system."""
        assert not self._taken, "copies out of it may be on their way"
        if self.memory:
            self._free()

    def _free(self) -> None:
        self.memory.clear()
        self.read.clear()
        unlock(self._device)


class Paged:
    """Two places on the device, each as large as the largest unit, filled in turn from page-locked memory.

    Units that run in rounds have page-locked memory of their own, the others one for each place. Where there is too
    little for all, those have one for each place too, filled anew at every turn; where there is none, it is ordinary.
    """

    def __init__(self, names: Sequence[Names], source: Source, device: torch.device, pages: Pages | None) -> None:
        """pages: for units that run in rounds; they are this one's until `close`."""
        self._names, self._source, self._device, self._pages = names, source, indexed(device), pages
        self._layouts = [layout(unit, source) for unit in names]
        self._sizes = {unit: end for unit, (_, end) in zip(names, self._layouts)}
        self._size = max(self._sizes.values())
        self._places: list[Tensor] = []
        self._shared: list[Tensor] = []  # memory of the host, one for each place
        self._copies = torch.cuda.Stream(self._device)
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]
        self._turns = 0
        if pages is not None:
            pages.take()

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        """Begin, in the thread that computes; see Carrier."""
        if not self._places:
            with torch.inference_mode(False):  # another thread writes into it, and that mode is a thread's own
                self._places = [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(2)]
            for event in self._left:
                event.record(self._computing())  # after all that used this memory before
        turn, self._turns = self._turns, self._turns + 1

        def carry() -> Tensors:
            place, (parts, end) = turn % 2, self._layouts[unit]
            with torch.cuda.device(self._device):  # a thread has a current device of its own, at first the first
                memory = self._filled(unit, place)
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(self._left[place])
                    self._places[place][:end].copy_(memory, non_blocking=True)
                    self._arrived[place].record(self._copies)
            return views(self._places[place], parts)

        return turn, carry

    def arrived(self, turn: int) -> None:
        self._computing().wait_event(self._arrived[turn % 2])

    def left(self, turn: int) -> None:
        self._left[turn % 2].record(self._computing())

    def close(self) -> None:
        # The memory goes back to the queue that computes, which knows nothing of the copies.
        try:
            self._copies.synchronize()
        finally:
            self._places.clear()
            self._shared.clear()
            if self._pages is not None:
                self._pages.release()

    def _computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def _filled(self, unit: int, place: int) -> Tensor:
        """The unit's tensors, side by side in the host's memory."""
        names, (parts, end) = self._names[unit], self._layouts[unit]
        if not self._shared and (self._pages is None or not self._pages.hold(self._sizes)):
            self._shared = two_places(self._size, self._device)
        pages = None if self._shared else self._pages
        if pages is not None and names in pages.read:
            return pages.memory[names]
        memory = self._shared[place][:end] if pages is None else pages.memory[names]
        self._arrived[place].synchronize()  # what lay there before is on the device
        for name, view in views(memory, parts).items():
            view.copy_(self._source(name))
        if pages is not None:
            pages.read.add(names)
        return memory


def two_places(size: int, device: torch.device) -> list[Tensor]:
    """Memory of the host for two units at a time, page-locked if that can be had."""
    try:
        return [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    except RuntimeError:
        tell_slow()
    unlock(device)  # the first, where only the second could not be had
    return [torch.empty(size, dtype=torch.uint8) for _ in range(2)]


@cache
def tell_slow() -> None:
    """Once in a process: networks that come and go would say it for every picture."""
    warnings.warn("the host has too little page-locked memory: weights come to the GPU more slowly", stacklevel=2)


def layout(names: Sequence[str], source: Source) -> tuple[Parts, int]:
    """Where each tensor begins when they lie side by side, with its dtype and shape; and the bytes they take."""
    parts, end = [], 0
    for name in names:
        parts.append((name, end, source.dtype(name), source.shapes[name]))
        end += -(-source.nbytes(name) // _ALIGNMENT) * _ALIGNMENT
    return parts, end


def views(memory: Tensor, parts: Parts) -> Tensors:
    """The tensors of a layout in bytes `(n,)`."""
    found = {}
    for name, begin, dtype, shape in parts:
        count = torch.Size(shape).numel()
        found[name] = memory[begin : begin + count * dtype.itemsize].view(dtype).view(shape)
    return found
