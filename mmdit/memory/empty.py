"""Modules without values, on PyTorch's "meta" device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """Leaves out the random values that layers begin with: on "meta" they are none, and load PyTorch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(module: Callable[[Any], Any], config: Any, dtype: torch.dtype | None = None) -> Any:
    """`module(config)` without memory, frozen. dtype: of its numbers; None keeps those of the layers."""
    with _Undrawn(), torch.device("meta"):
        return module(config).to(dtype).requires_grad_(False)
