"""GPUs played in the host's memory: all is done at once, but only what the queues have ordered counts as ordered.

Every queue has a clock, and so has the host: the number of things it has done, and what it knows of the others' clocks.
A queue knows what the host knew when it was given its work; beyond that, one knows of another only by waiting for it.
Memory that is used by one, while what another did with it need not be done yet, is an error.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, local
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit.memory import devices, paged, streaming
from mmdit.memory.paged import Paged

Clock = dict[int, int]  # by the number of a queue, 0 for the host


class Timeline:
    """What does one thing after another: a queue, or the host."""

    def __init__(self, gpu: "Gpu", device: Any = None) -> None:
        self.gpu, self.index = gpu, getattr(device, "index", None) or 0
        self.number = len(gpu.timelines)
        self.clock: Clock = {self.number: 0}
        gpu.timelines.append(self)

    def learn(self, clock: Clock) -> None:
        for number, count in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), count)

    def act(self) -> None:
        self.learn(self.gpu.host.clock)
        self.clock[self.number] += 1

    def wait_event(self, event: "Event") -> None:
        self.learn(event.clock)

    def synchronize(self) -> None:
        self.gpu.host.learn(self.clock)


class Event:
    def __init__(self, gpu: "Gpu") -> None:
        self.gpu, self.clock = gpu, {}  # never recorded: nothing to wait for

    def record(self, queue: Timeline | None = None) -> None:
        queue = queue or self.gpu.current_stream(torch.device("cuda", self.gpu.thread.device))
        queue.learn(self.gpu.host.clock)
        self.clock = dict(queue.clock)

    def synchronize(self) -> None:
        self.gpu.host.learn(self.clock)


class Memory:
    """Who last wrote it, and who has read it since: each by the number of its timeline, with the clock's count."""

    def __init__(self, gpu: "Gpu", index: int | None) -> None:
        self.gpu, self.index = gpu, index  # of the GPU; None: the host's
        self.written: tuple[int, int] = (0, 0)
        self.read: list[tuple[int, int]] = []

    def use(self, who: Timeline, write: bool) -> None:
        for number, count in (self.written, *(self.read if write else ())):
            assert who.clock.get(number, 0) >= count, "memory is used while another may still be at it"
        if write:
            self.written, self.read = (who.number, who.clock[who.number]), []
        else:
            self.read.append((who.number, who.clock[who.number]))

    def free(self) -> None:
        """A GPU's memory is given to the queue that computes there, which knows nothing of others."""
        known = [self.gpu.host.clock, self.gpu.default(self.index or 0).clock]
        for number, count in (self.written, *self.read):
            if self.index is not None and all(clock.get(number, 0) < count for clock in known):
                self.gpu.harm.append("memory of the GPU is freed while a copy may be on its way")


class Tracked(Tensor):
    """A tensor in memory that is looked after."""

    gpu: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and isinstance(args[1], torch.device) and args[1].type == "cuda":
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            given = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Tensor)]
            if func is Tensor.copy_:
                cls.gpu.used(given[1:], given[:1])
                return result
            if not isinstance(result, Tensor):
                return result
            if any(result.untyped_storage().data_ptr() == arg.untyped_storage().data_ptr() for arg in given):
                return result if type(result) is cls else result.as_subclass(cls)  # a view
            cls.gpu.used(given, [])
            return result


class Gpu:
    """Stands for torch where there are GPUs, on a host that page-locks so many bytes and no more.

    Each page-locked piece takes a power of two, and what is freed stays page-locked until copies are done and the cache
    is emptied.
    """

    def __init__(self, most: int = 10**12) -> None:
        self.lock, self.thread = RLock(), _Thread()
        self.timelines: list[Timeline] = []
        self.host = Timeline(self)
        self.queues: dict[int, Timeline] = {}
        self.memory: dict[int, Memory] = {}
        self.harm: list[str] = []
        self.most = most
        self.asked: list[int] = []  # bytes that were to be page-locked, piece by piece
        self.pageable: list[int] = []
        self.places: list[Any] = []  # devices of what was asked for there
        self.taken = 0  # bytes that are page-locked
        self.cached: list[int] = []  # sizes of those that were freed
        self.unused: list[int] = []  # of which copies are known to be done
        self.contexts: set[int] = set()  # GPUs that were current when memory was page-locked, which each keeps some for
        self.cuda = SimpleNamespace(
            Stream=lambda device: Timeline(self, device), Event=lambda: Event(self), current_stream=self.current_stream,
            stream=self.stream, device=self.device, synchronize=self.synchronize, empty_cache=lambda: None,
        )  # fmt: skip
        self._C: Any = SimpleNamespace(_host_emptyCache=self.empty_cache)
        Tracked.gpu = self

    def play(self, patch: pytest.MonkeyPatch) -> None:
        """Have streams go through this GPU, whatever device they name, from now on."""
        for module in (paged, devices):
            patch.setattr(module, "torch", self)
        patch.setattr(streaming, "carrier", Paged)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    # ---- order -----------------------------------------------------------------------------------

    def default(self, index: int) -> Timeline:
        if index not in self.queues:
            self.queues[index] = Timeline(self, torch.device("cuda", index))
        return self.queues[index]

    def current_stream(self, device: Any) -> Timeline:
        index, now = getattr(device, "index", None) or 0, self.thread.queue
        return now if now is not None and now.index == index else self.default(index)

    @contextmanager
    def stream(self, queue: Timeline) -> Iterator[None]:
        before, self.thread.queue = self.thread.queue, queue
        yield
        self.thread.queue = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.thread.device = self.thread.device, getattr(device, "index", None) or 0
        yield
        self.thread.device = before

    def used(self, read: list[Tensor], written: list[Tensor]) -> None:
        """By the queue of the GPU whose memory is among it, else by the host."""
        with self.lock:
            found = [(m, w) for w, some in ((False, read), (True, written)) for t in some if (m := self.of(t))]
            indices = [memory.index for memory, _ in found if memory.index is not None]
            who = self.current_stream(torch.device("cuda", indices[0])) if indices else self.host
            who.act()
            for memory, write in found:
                memory.use(who, write)

    def of(self, tensor: Tensor) -> Memory | None:
        return self.memory.get(tensor.untyped_storage().data_ptr())

    def copied(self) -> bool:
        """Whether the host knows that all is done in the queues that do not compute."""
        others = [queue for queue in self.timelines if queue is not self.host and queue not in self.queues.values()]
        return all(self.host.clock.get(queue.number, 0) >= queue.clock[queue.number] for queue in others)

    # ---- memory ----------------------------------------------------------------------------------

    def empty(self, *size: int, pin_memory: bool = False, device: Any = None, **more: Any) -> Tensor:
        if device is not None:
            self.places.append(device)
        elif pin_memory:
            self._page_lock(*size)
        else:
            self.pageable += size
        found = torch.empty(*size, **more)
        memory = Memory(self, None if device is None else getattr(device, "index", None) or 0)
        address, locked = found.untyped_storage().data_ptr(), power_of_two(*size) if pin_memory else 0
        self.memory[address] = memory
        weakref.finalize(found.untyped_storage(), self._freed, address, locked)
        if device is not None:  # its last user was the queue that computes
            self.used([], [found])
        return found.as_subclass(Tracked)

    def _freed(self, address: int, locked: int) -> None:
        self.memory.pop(address).free()
        if locked:
            self.cached.append(locked)

    def _page_lock(self, size: int) -> None:
        self.asked.append(size)
        self.contexts.add(self.thread.device)
        taken = power_of_two(size)
        if taken in self.cached:
            self.cached.remove(taken)
        elif self.taken + taken > self.most:
            raise RuntimeError("CUDA error: out of memory")
        else:
            self.taken += taken

    def synchronize(self, device: Any = None) -> None:  # noqa: ARG002
        for timeline in self.timelines:
            self.host.learn(timeline.clock)
        self.unused = list(self.cached)

    def empty_cache(self) -> None:
        for size in self.unused:
            self.cached.remove(size)
            self.taken -= size
        self.unused = []


class _Thread(local):
    queue: Timeline | None = None
    device = 0


def power_of_two(size: int) -> int:
    """The least that is not smaller."""
    return next(2**k for k in range(60) if 2**k >= size)
