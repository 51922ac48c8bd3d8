"""Counting the memory that code really asks for, tensor by tensor, on real or on fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While it is entered, the bytes of all tensors made since and still alive, in pools, and their peaks.

    pool: the name of a new storage's pool, asked when it is made.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), pool: Callable[[], str] = lambda: "device") -> None:
        super().__init__()
        self.pool, self.live, self.peak = pool, {}, {}
        self.together = 0  # the peak of all pools' sum
        self.seen: dict[int, Any] = {id(t.untyped_storage()): t.untyped_storage() for t in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.seen:
            return
        name, size, key = self.pool(), storage.nbytes(), id(storage)
        self.seen[key] = weakref.ref(storage, lambda _: self._remove(key, name, size))
        self.live[name] = self.live.get(name, 0) + size
        self.peak[name] = max(self.peak.get(name, 0), self.live[name])
        self.together = max(self.together, sum(self.live.values()))

    def _remove(self, key: int, name: str, size: int) -> None:
        del self.seen[key]
        self.live[name] -= size
