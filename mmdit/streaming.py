"""Weights that are on the device only while the module that owns them runs, the next module's on their way meanwhile.

The device holds two modules' weights at a time. For a GPU a thread writes the next module's weights into page-locked
memory, out of the mapped file and with whatever conversion they need, and a second queue of the GPU copies them over
while the first computes; weights that are read more than once stay page-locked. For a CPU the thread does the
conversion, and weights that need none are used where they lie in the file.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """How a unit's tensors come to the device."""

    def start(self, unit: int) -> Callable[[], Tensors]:
        """Begin; what is returned is called in a thread and gives the tensors, on their way."""
        ...

    def arrived(self) -> None:
        """Called before the tensors that were started first are used."""
        ...

    def left(self) -> None:
        """Called when they have been used."""
        ...

    def close(self) -> None: ...


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
        self._units, self._bind, self._rounds = units, bind, rounds
        names = [unit.names for unit in units]
        self._carrier = Paged(names, source, device, rounds) if device.type == "cuda" else Direct(names, source, device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: tuple[int, Future[Tensors]] | None = None
        self._handles = []
        for i, unit in enumerate(units):
            self._handles.append(unit.module.register_forward_pre_hook(lambda *_, i=i: self._enter(i)))
            self._handles.append(unit.module.register_forward_hook(lambda *_, i=i: self._leave(i)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._worker.shutdown()
        self._carrier.close()
        for i in range(len(self._units)):
            self._unbind(i)

    def _start(self, i: int) -> None:
        self._ahead = i, self._worker.submit(self._carrier.start(i))

    def _enter(self, i: int) -> None:
        if self._ahead is None or self._ahead[0] != i:  # the first of all, or a round was broken off
            self._skip()
            self._start(i)
        assert self._ahead is not None
        tensors = self._ahead[1].result()
        self._ahead = None
        self._carrier.arrived()
        for name, tensor in tensors.items():
            self._bind(name, tensor)
        if self._rounds or i + 1 < len(self._units):
            self._start((i + 1) % len(self._units))

    def _leave(self, i: int) -> None:
        self._unbind(i)
        self._carrier.left()
        if not self._rounds and i + 1 == len(self._units):
            self._carrier.close()

    def _skip(self) -> None:
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None
            self._carrier.arrived()
            self._carrier.left()

    def _unbind(self, i: int) -> None:
        for name in self._units[i].names:
            self._bind(name, None)


class Direct:
    """For devices that read the host's memory, or have no queue of their own."""

    def __init__(self, names: Sequence[tuple[str, ...]], source: Source, device: torch.device) -> None:
        self._names, self._source, self._device = names, source, device

    def start(self, unit: int) -> Callable[[], Tensors]:
        return lambda: {name: self._source(name).to(self._device) for name in self._names[unit]}

    def arrived(self) -> None: ...

    def left(self) -> None: ...

    def close(self) -> None: ...


class Paged:
    """For CUDA: two places on the device, each as large as the largest unit, filled in turn from page-locked memory."""

    def __init__(self, names: Sequence[tuple[str, ...]], source: Source, device: torch.device, rounds: bool) -> None:
        self._source, self._rounds = source, rounds
        self._layouts = [layout(unit, source) for unit in names]
        self._size, self._device = max(end for _, end in self._layouts), device
        self._places: list[Tensor] = []
        self._pages: dict[int, Tensor] = {}  # by unit where they are kept, else by place
        self._copies = torch.cuda.Stream(device)
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]
        self._started = self._used = 0  # how many units, for whose turn it is

    def start(self, unit: int) -> Callable[[], Tensors]:
        if not self._places:
            self._places = [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(2)]
            for event in self._left:
                event.record()  # after all that used this memory before
        place = self._started % 2
        self._started += 1

        def carry() -> Tensors:
            pages, (parts, end) = self._page_locked(unit, place), self._layouts[unit]
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._left[place])
                self._places[place][:end].copy_(pages[:end], non_blocking=True)
                self._arrived[place].record()
            return views(self._places[place], parts)

        return carry

    def arrived(self) -> None:
        torch.cuda.current_stream().wait_event(self._arrived[self._used % 2])

    def left(self) -> None:
        self._left[self._used % 2].record()
        self._used += 1

    def close(self) -> None:
        # The memory goes back to the queue that computes, which knows nothing of the copies.
        self._copies.synchronize()
        self._places.clear()
        if not self._rounds:
            self._pages.clear()

    def _page_locked(self, unit: int, place: int) -> Tensor:
        """The unit's tensors, side by side in page-locked memory."""
        parts, end = self._layouts[unit]
        key = unit if self._rounds else place
        if self._rounds and key in self._pages:
            return self._pages[key]
        self._arrived[place].synchronize()  # what lay there before is on the device
        if key not in self._pages:
            size = end if self._rounds else self._size
            self._pages[key] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for name, view in views(self._pages[key], parts).items():
            view.copy_(self._source(name))
        return self._pages[key]


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
