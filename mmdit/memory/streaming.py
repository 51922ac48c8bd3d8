"""Weights that are on the device only while the module that owns them runs, the next module's on their way meanwhile.

The device holds two modules' weights at a time; a thread prepares the next one's. For CUDA see `mmdit.memory.paged`.
For a CPU the thread does the conversion, and weights that need none are used where they lie in the file.

Where gradients are computed a module's weights stay until the next one runs, since what goes back through it follows.
On the way back modules that are computed again (`mmdit.recompute`) come in the reverse order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmdit.memory.devices import trim
from mmdit.memory.paged import Names, Paged, Pages, Tensors
from weights import Source

_WORTH_RETURNING = 1048576


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
        pages: Pages | None = None,
    ) -> None:
        """bind: puts a tensor, or none, into its place in the network. rounds: whether the units run more than once.

        pages: where units that do stay in the host's memory; they outlive the stream.
        """
        self._units, self._bind, self._rounds, self._device = units, bind, rounds, device
        names = [unit.names for unit in units]
        self._carrier = carrier(names, source, device, (pages or Pages(device)) if rounds else None)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: Ahead | None = None
        self._turn: int | None = None  # of the unit that runs, or ran last and has not been left
        self._unit = -1  # that one
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
        if self._turn is not None:  # gradients went back through it, or the round was broken off
            self._unbind(self._unit)
            self._carrier.left(self._turn)
        if ahead is not None and ahead.unit != i:  # what comes for another unit is of no use, nor is its error
            ahead = None
        ahead = ahead or self._start(i)
        for name, tensor in ahead.tensors.result().items():
            self._bind(name, tensor.to(self._device))
        back = 0 < i <= self._unit
        self._turn, self._unit = ahead.turn, i
        self._carrier.arrived(ahead.turn)
        if self._rounds or i + 1 < len(self._units):
            self._ahead = self._start((i + (-1 if back else 1)) % len(self._units))

    def _leave(self, i: int) -> None:
        if self._rounds and torch.is_grad_enabled():
            return  # until the next enters
        self._unbind(i)
        assert self._turn is not None
        self._carrier.left(self._turn)
        self._turn = None
        if not self._rounds and i + 1 == len(self._units):
            self._carrier.close()

    def _unbind(self, i: int) -> None:
        for name in self._units[i].names:
            self._bind(name, None)


def carrier(names: Sequence[Names], source: Source, device: torch.device, pages: Pages | None) -> Carrier:
    """What carries units with these tensors to the device. pages: of units that run in rounds."""
    return Paged(names, source, device, pages) if device.type == "cuda" else Direct(names, source, device)


class Direct:
    """For devices that read the host's memory, or have no queue of their own. A unit's number is its turn."""

    def __init__(self, names: Sequence[Names], source: Source, device: torch.device) -> None:
        self._names, self._source = names, source
        self._where = torch.device("cpu") if device.type == "mps" else device  # Metal is for one thread
        self._gone = 0  # bytes of units that have left since memory was returned

    def start(self, unit: int) -> tuple[int, Callable[[], Tensors]]:
        return unit, lambda: {name: self._source(name).to(self._where) for name in self._names[unit]}

    def arrived(self, turn: int) -> None: ...

    def left(self, turn: int) -> None:
        if self._where.type != "cpu":
            return
        self._gone += sum(self._source.nbytes(name) for name in self._names[turn])
        if self._gone >= _WORTH_RETURNING:  # what was converted for one unit is not to lie beside the next
            self._gone = 0
            trim()

    def close(self) -> None: ...
