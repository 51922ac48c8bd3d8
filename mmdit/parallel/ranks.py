"""The processes of a run, as each of them sees them: what goes between them, and what is decided by all together.

Tensors go through `Line.exchange` and nowhere else, decisions through a group of their own on the CPU. So an error of
one process finds the others where they can be told: before an evaluation, after it, or at the end of a stage.
"""

import pickle
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.common.errors import SettingsError

T = TypeVar("T")

TENSORS = timedelta(minutes=5)  # how long tensors of another process may be waited for
DECISIONS = timedelta(days=1)  # and its decisions: it may have longer pictures of a list to draw


class LostError(SettingsError):
    """Another process of the run is gone."""


class Layout(NamedTuple):
    """How an evaluation is shared: the rows of its batch by so many, each row's image tokens by so many.

    Where that is fewer than there are, the others do the same once more: nobody waits for them, they wait for nobody.
    """

    rows: int = 1
    tokens: int = 1


class Line:
    """Some of the processes, in order, and the place that this one has among them."""

    def __init__(self, size: int, place: int, group: Any) -> None:
        self.size, self.place, self._group = size, place, group

    def exchange(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give each process of the line its tensor, and get what each gives this one, of shapes known beforehand.

        All are of one number format, and on the device. Raises LostError where somebody is gone.
        """
        into = [part.numel() for part in sent]
        outof = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([part.reshape(-1) for part in sent])
        found = flat.new_empty(sum(outof))
        with losing():
            dist.all_to_all_single(found, flat, outof, into, group=self._group)
        return [part.view(torch.Size(shape)) for part, shape in zip(found.split(outof), shapes)]

    def gather(self, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Everybody's tensor, of shapes known beforehand."""
        return self.exchange([own] * self.size, shapes)


class Ranks:
    """All processes of a run. `rank` is this one's number; number 0 writes and speaks for all."""

    def __init__(self, rank: int, size: int, control: Any = None) -> None:
        """control: a group on the CPU, for decisions; by default all of those that are there already."""
        self.rank, self.size, self._control, self._backend = rank, size, control, "gloo"
        self._lines: dict[Layout, tuple[Line, Line]] = {}
        self._groups: dict[tuple[int, ...], Any] = {}

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on(self, device: torch.device) -> None:
        """The device of this process. Raises SettingsError, in all, where some have one of another kind."""
        kinds = self.everybody(device.type)
        if len(set(kinds)) > 1:
            raise SettingsError(f"the processes have {', '.join(kinds)}: expected a device of one kind for each")
        self._backend = "nccl" if device.type == "cuda" else "gloo"

    def lines(self, layout: Layout) -> tuple[Line, Line]:
        """Those who have other rows of the same evaluation, and those who have other tokens of the same rows.

        Called by all in the same order, since a group is made by all.
        """
        if layout not in self._lines:
            rows, tokens = layout
            assert self.size % (rows * tokens) == 0, (layout, self.size)
            starts = range(0, self.size, rows * tokens)
            beside = [[start + row * tokens + i for row in range(rows)] for start in starts for i in range(tokens)]
            within = [[start + row * tokens + i for i in range(tokens)] for start in starts for row in range(rows)]
            self._lines[layout] = self._line(beside), self._line(within)
        return self._lines[layout]

    def _line(self, every: Sequence[Sequence[int]]) -> Line:
        """The line that this process is in; `every` is all of them."""
        for ranks in map(tuple, every):
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=TENSORS, backend=self._backend)
        own = next(tuple(ranks) for ranks in every if self.rank in ranks)
        return Line(len(own), own.index(self.rank), self._groups[own])

    # ---- decisions ---------------------------------------------------------------------------------

    def everybody(self, value: T) -> list[T]:
        """What each process says, in their order; anything that can be pickled."""
        found: list[Any] = [None] * self.size
        with losing():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def of_first(self, value: T) -> T:
        """What process 0 says."""
        box: list[Any] = [value if self.first else None]
        with losing():
            dist.broadcast_object_list(box, 0, group=self._control)
        return box[0]

    def least(self, number: int) -> int:
        told = torch.tensor([number])
        with losing():
            dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self._control)
        return int(told)

    def agree(self, error: bytes | None = None) -> None:
        """Come here in all processes; where one comes with an error, `packed`, all raise that: the first of several."""
        if self.least(self.size if error is None else self.rank) < self.size:
            agreed = pickle.loads(next(told for told in self.everybody(error) if told is not None))
            agreed.agreed = True
            raise agreed

    def packed(self, error: Exception) -> bytes:
        """An error that every process can raise: those that users see as they are, others by name.

        The error itself keeps all that was made until it came: let it go before anything else is computed.
        """
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return pickle.dumps(RuntimeError(f"process {self.rank}: out of memory: {error}"))
        try:
            plain = type(error)(str(error))
            if isinstance(error, ValueError) and str(plain) == str(error):
                return pickle.dumps(plain)
        except Exception:  # it is made of something else than a message
            pass
        return pickle.dumps(RuntimeError(f"process {self.rank}: {type(error).__name__}: {error}"))

    def together(self, work: Callable[[], T]) -> T:
        """Do the work in every process. An error in one, which is not that of all already, is the error of all."""
        result, told = None, None
        try:
            result = work()
        except Exception as error:
            if getattr(error, "agreed", False) or isinstance(error, LostError):
                raise
            told = self.packed(error)
        self.agree(told)
        return cast(T, result)


@contextmanager
def losing() -> Any:
    """Turn what the library says where another process is gone into a LostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).splitlines()[0][:200]
        raise LostError(f"another process of this run has ended, or has not answered in time ({said})") from None
