"""How much memory a computation takes at its peak, by running it without memory: on PyTorch's "meta" device."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdit.memory.shapes import quick


class Meter(TorchDispatchMode):
    """Counts the bytes of the "meta" tensors made while it is on.

    now: of those that live; peak: the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be kept from PyTorch's compiler, which would be loaded for that, in seconds."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        result = quick(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tensors((*args, *kwargs.values()))}
        for made in tensors((result,)):
            if made.is_meta and (storage := made.untyped_storage())._cdata not in given:
                self._see(storage)
        return result

    def _see(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among values, and in lists and tuples of them; quicker than PyTorch's own way, which knows more kinds."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels have it, without a table of scores; "meta" has only the plain formula."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        return _Fused.apply(q, k, v)


class _Fused(torch.autograd.Function):
    """What it gives and, on the way back, what it keeps and gives; no numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)[..., : v.shape[-1]]
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


@torch.no_grad()
def peak_bytes(compute: Callable[..., object], *given: Any) -> int:
    """The most bytes that tensors made in `compute(*given)` take at a time; it has to work on "meta" tensors."""
    with FusedAttention(), Meter() as meter:
        compute(*given)
    return meter.peak


@torch.no_grad()
def held_bytes(compute: Callable[..., object], *given: Any) -> int:
    """The bytes of the tensors that `compute(*given)` returns, on "meta"; views of one memory count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(compute(*given))}
    return sum(storage.nbytes() for storage in storages.values())
