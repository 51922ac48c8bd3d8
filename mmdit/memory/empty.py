"""Modules without values, on PyTorch's "meta" device."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Leaves out the values that layers begin with: on "meta" they are none, and load PyTorch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(module: Callable[[Any], Any], config: Any, dtype: torch.dtype | None = None) -> Any:
    """`module(config)` without memory, frozen. dtype: of its numbers; None keeps those of the layers."""
    with Undrawn(), torch.device("meta"):
        made = module(config)
        return (made if dtype is None else made.to(dtype)).requires_grad_(False)


def emptied(module: nn.Module) -> Any:
    """A copy of a module as it is now, without memory and without hooks.

    Functions in the places of methods, which may hold the original, are left out; methods bound to their module stay.
    """
    known: dict[int, Any] = {}
    strange: list[tuple[int, str]] = []  # the number of a module, and the name there
    for parameter in module.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    for i, part in enumerate(module.modules()):
        for name, value in vars(part).items():
            if name.endswith("_hooks"):  # what they see is whoever put them there's
                known[id(value)] = OrderedDict()
            elif callable(value) and callable(getattr(type(part), name, None)) and _of(value) is not part:
                known[id(value)] = value
                strange.append((i, name))
    found = deepcopy(module, known)
    parts = list(found.modules())
    for i, name in strange:
        del vars(parts[i])[name]
    return found


def _of(function: Any) -> Any:
    """What a method is bound to."""
    return getattr(function, "__self__", None)
