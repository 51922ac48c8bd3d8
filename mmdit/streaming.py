"""Weights that are on the device only while the module that owns them runs, the next module's on their way meanwhile.

The device holds two modules' weights at a time. For a GPU a thread writes the next module's weights into page-locked
memory, out of the mapped file and with whatever conversion they need, and a second queue of the GPU copies them over
while the first computes; weights that are read more than once stay page-locked, if there is room for that. For a CPU
the thread does the conversion, and weights that need none are used where they lie in the file.
"""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from weights import Source

Tensors = dict[str, Tensor]
_ALIGNMENT = 256  # bytes, as the GPU's own allocator aligns


class Unit(NamedTuple):
    """A module of a network, and the tensors, by their names in the network, that it needs while it runs."""

    module: nn.Module
    names: tuple[str, ...]


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
    ) -> None:
        """bind: puts a tensor, or none, into its place in the network. rounds: whether the units run more than once."""
        self._units, self._bind, self._rounds, self._device = units, bind, rounds, device
        names = [unit.names for unit in units]
        self._carrier = Paged(names, source, device, rounds) if device.type == "cuda" else Direct(names, source, device)
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


class Direct:
    """For devices that read the host's memory, or have no queue of their own."""

    def __init__(self, names: Sequence[tuple[str, ...]], source: Source, device: torch.device) -> None:
        self._names, self._source = names, source
        self._where = torch.device("cpu") if device.type == "mps" else device  # Metal is for one thread

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        return 0, lambda: {name: self._source(name).to(self._where) for name in self._names[unit]}

    def arrived(self, turn: int) -> None: ...

    def left(self, turn: int) -> None: ...

    def close(self) -> None:
        if self._where.type == "cpu":  # what was converted before the loop is not to lie beside it
            give_back()


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what is not at the end of its heap, some hundred megabytes."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Paged:
    """For CUDA: two places on the device, each as large as the largest unit, filled in turn from page-locked memory.

    Units that run in rounds have page-locked memory of their own, the others one for each place. Where there is too
    little for all, those have one for each place too, filled anew at every turn; where there is none, it is ordinary.
    """

    def __init__(self, names: Sequence[tuple[str, ...]], source: Source, device: torch.device, rounds: bool) -> None:
        self._source, self._stay, self._device = source, rounds, device  # whether what was read stays page-locked
        self._layouts = [layout(unit, source) for unit in names]
        self._size = max(end for _, end in self._layouts)
        self._begins = list(accumulate((end for _, end in self._layouts), initial=0))
        self._places: list[Tensor] = []
        self._pages: Tensor | None = None
        self._read: set[int] = set()  # units whose tensors are in page-locked memory
        self._copies = torch.cuda.Stream(device)
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]
        self._turns = 0

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        if not self._places:
            self._places = [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(2)]
            for event in self._left:
                event.record()  # after all that used this memory before
        turn, self._turns = self._turns, self._turns + 1

        def carry() -> Tensors:
            place, (parts, end) = turn % 2, self._layouts[unit]
            pages = self._page_locked(unit, place)
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._left[place])
                self._places[place][:end].copy_(pages, non_blocking=True)
                self._arrived[place].record()
            return views(self._places[place], parts)

        return turn, carry

    def arrived(self, turn: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[turn % 2])

    def left(self, turn: int) -> None:
        self._left[turn % 2].record()

    def close(self) -> None:
        # The memory goes back to the queue that computes, which knows nothing of the copies.
        self._copies.synchronize()
        self._places.clear()
        if not self._stay:
            self._pages = None

    def _page_locked(self, unit: int, place: int) -> Tensor:
        """The unit's tensors, side by side in page-locked memory, or in ordinary where that cannot be had."""
        if self._pages is None:
            self._pages = self._host_memory()
        parts, end = self._layouts[unit]
        begin = self._begins[unit] if self._stay else place * self._size
        pages = self._pages[begin : begin + end]
        if unit not in self._read:
            self._arrived[place].synchronize()  # what lay there before is on the device
            for name, view in views(pages, parts).items():
                view.copy_(self._source(name))
            if self._stay:
                self._read.add(unit)
        return pages

    def _host_memory(self) -> Tensor:
        """For all units that are to stay there, else for two; all at once: PyTorch rounds each up to a power of two."""
        if self._stay:
            try:
                return torch.empty(self._begins[-1], dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._stay = False
                tell_slow()
        try:
            return torch.empty(2 * self._size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            tell_slow()
        return torch.empty(2 * self._size, dtype=torch.uint8)


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
