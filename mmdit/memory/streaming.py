"""Weights that are on the device only while the module that owns them runs, the next module's on their way meanwhile.

The device holds two modules' weights at a time. For a GPU a thread writes the next module's weights into page-locked
memory, out of the mapped file and with whatever conversion they need, and a second queue of the GPU copies them over
while the first computes; weights that are read more than once stay page-locked, if there is room for that, and are not
read again when their network comes back. For a CPU the thread does the conversion, and weights that need none are used
where they lie in the file.
"""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmdit.memory.host import available_bytes
from weights import Source

Tensors = dict[str, Tensor]
Names = tuple[str, ...]
_ALIGNMENT = 256  # bytes, as the GPU's own allocator aligns


class Unit(NamedTuple):
    """A module of a network, and the tensors, by their names in the network, that it needs while it runs."""

    module: nn.Module
    names: Names


class Carrier(Protocol):
    """How a unit's tensors come to the device; `turn` tells one coming from another."""

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        """Begin; returns the turn, and what, called in a thread, gives the tensors on their way."""
        ...

    def arrived(self, turn: int) -> None:
        """Called before the tensors are used."""
        ...

    def left(self, turn: int) -> None:
        """Called when they have been used."""
        ...

    def close(self) -> None: ...


class Ahead(NamedTuple):
    """A unit on its way."""

    unit: int
    turn: int
    tensors: Future[Tensors]


class Stream:
    """Hooks on units that run one after another in the order given, once or in rounds; `close` takes them off."""

    def __init__(
        self,
        units: Sequence[Unit],
        source: Source,
        bind: Callable[[str, Tensor | None], None],
        device: torch.device,
        rounds: bool,
        pages: "Pages | None" = None,
    ) -> None:
        """bind: puts a tensor, or none, into its place in the network. rounds: whether the units run more than once.

        pages: where units that do stay in the host's memory; they outlive the stream.
        """
        self._units, self._bind, self._rounds, self._device = units, bind, rounds, device
        names = [unit.names for unit in units]
        self._carrier = carrier(names, source, device, (pages or Pages()) if rounds else None)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: Ahead | None = None
        self._turn = 0  # of the unit that runs
        self._handles = []
        for i, unit in enumerate(units):
            self._handles.append(unit.module.register_forward_pre_hook(lambda *_, i=i: self._enter(i)))
            self._handles.append(unit.module.register_forward_hook(lambda *_, i=i: self._leave(i)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._worker.shutdown()
        self._ahead = None
        self._carrier.close()
        for i in range(len(self._units)):
            self._unbind(i)

    def _start(self, i: int) -> Ahead:
        turn, carry = self._carrier.start(i)
        return Ahead(i, turn, self._worker.submit(carry))

    def _enter(self, i: int) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.unit != i:  # a round was broken off
            ahead.tensors.result()
            self._carrier.left(ahead.turn)
            ahead = None
        ahead = ahead or self._start(i)
        for name, tensor in ahead.tensors.result().items():
            self._bind(name, tensor.to(self._device))
        self._turn = ahead.turn
        self._carrier.arrived(self._turn)
        if self._rounds or i + 1 < len(self._units):
            self._ahead = self._start((i + 1) % len(self._units))

    def _leave(self, i: int) -> None:
        self._unbind(i)
        self._carrier.left(self._turn)
        if not self._rounds and i + 1 == len(self._units):
            self._carrier.close()

    def _unbind(self, i: int) -> None:
        for name in self._units[i].names:
            self._bind(name, None)


def carrier(names: Sequence[Names], source: Source, device: torch.device, pages: "Pages | None") -> Carrier:
    """What carries units with these tensors to the device. pages: of units that run in rounds."""
    return Paged(names, source, device, pages) if device.type == "cuda" else Direct(names, source, device)


class Direct:
    """For devices that read the host's memory, or have no queue of their own."""

    def __init__(self, names: Sequence[Names], source: Source, device: torch.device) -> None:
        self._names, self._source = names, source
        self._where = torch.device("cpu") if device.type == "mps" else device  # Metal is for one thread

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        return 0, lambda: {name: self._source(name).to(self._where) for name in self._names[unit]}

    def arrived(self, turn: int) -> None: ...

    def left(self, turn: int) -> None:  # noqa: ARG002
        if self._where.type == "cpu":  # what was converted for one unit is not to lie beside the next
            give_back()

    def close(self) -> None: ...


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what is not at the end of its heap, some hundred megabytes."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Pages:
    """Page-locked memory of units that run in rounds: each has its own, so that it is read once.

    It outlives the carrier that fills it, and is one carrier's at a time.
    """

    def __init__(self) -> None:
        self.memory: dict[Names, Tensor] = {}
        self.read: set[Names] = set()  # units of which all tensors are there
        self._taken = False

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
        free = available_bytes()
        if free is not None and sum(map(locked_bytes, sizes.values())) > free // 2:
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
        unlock()


def locked_bytes(size: int) -> int:
    """What so many page-locked bytes take: PyTorch rounds them up to a power of two."""
    return 1 << max(size - 1, 0).bit_length()


def unlock() -> None:
    """Return page-locked memory that nobody uses to the system: PyTorch would keep all that it ever had."""
    with suppress(AttributeError, RuntimeError):  # another version of PyTorch; a GPU that has failed
        torch.cuda.synchronize()  # what was freed a moment ago is still taken for used by copies otherwise
        torch._C._host_emptyCache()


class Paged:
    """For CUDA: two places on the device, each as large as the largest unit, filled in turn from page-locked memory.

    Units that run in rounds have page-locked memory of their own, the others one for each place. Where there is too
    little for all, those have one for each place too, filled anew at every turn; where there is none, it is ordinary.
    """

    def __init__(self, names: Sequence[Names], source: Source, device: torch.device, pages: Pages | None) -> None:
        """pages: for units that run in rounds; they are this one's until `close`."""
        self._names, self._source, self._device, self._pages = names, source, device, pages
        self._layouts = [layout(unit, source) for unit in names]
        self._sizes = {unit: end for unit, (_, end) in zip(names, self._layouts)}
        self._size = max(self._sizes.values())
        self._places: list[Tensor] = []
        self._shared: list[Tensor] = []  # memory of the host, one for each place
        self._copies = torch.cuda.Stream(device)
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]
        self._turns = 0
        if pages is not None:
            pages.take()

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        if not self._places:
            self._places = [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(2)]
            for event in self._left:
                event.record()  # after all that used this memory before
        turn, self._turns = self._turns, self._turns + 1

        def carry() -> Tensors:
            place, (parts, end) = turn % 2, self._layouts[unit]
            memory = self._filled(unit, place)
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._left[place])
                self._places[place][:end].copy_(memory, non_blocking=True)
                self._arrived[place].record()
            return views(self._places[place], parts)

        return turn, carry

    def arrived(self, turn: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[turn % 2])

    def left(self, turn: int) -> None:
        self._left[turn % 2].record()

    def close(self) -> None:
        # The memory goes back to the queue that computes, which knows nothing of the copies.
        try:
            self._copies.synchronize()
        finally:
            self._places.clear()
            self._shared.clear()
            if self._pages is not None:
                self._pages.release()

    def _filled(self, unit: int, place: int) -> Tensor:
        """The unit's tensors, side by side in the host's memory."""
        names, (parts, end) = self._names[unit], self._layouts[unit]
        if not self._shared and (self._pages is None or not self._pages.hold(self._sizes)):
            self._shared = two_places(self._size)
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


def two_places(size: int) -> list[Tensor]:
    """Memory of the host for two units at a time, page-locked if that can be had."""
    try:
        return [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    except RuntimeError:
        tell_slow()
    unlock()  # the first, where only the second could not be had
    return [torch.empty(size, dtype=torch.uint8) for _ in range(2)]


@cache
def tell_slow() -> None:
    """Once in a process: networks that come and go would say it for every picture."""
    warnings.warn("the host has too little page-locked memory: weights come to the GPU more slowly", stacklevel=2)


Parts = list[tuple[str, int, torch.dtype, tuple[int, ...]]]


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
