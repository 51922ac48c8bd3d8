"""Where a faster form may stand in: a module's forward has to be the very function that it was written for.

Beside each faster form that function is written out once more. A forward of other code, whoever changed it and how,
is called as it is.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


@cache
def same_code(function: Callable[..., Any], plain: Callable[..., Any]) -> bool:
    """Whether two functions are compiled from the same lines: instructions, constants and names."""
    one, other = getattr(function, "__code__", None), getattr(plain, "__code__", None)
    if one is None or other is None:
        return False
    return all(
        getattr(one, name) == getattr(other, name) for name in ("co_code", "co_consts", "co_names", "co_argcount")
    )


def forward_is(module: nn.Module, plain: Callable[..., Any]) -> bool:
    """Whether the forward of a module's class is `plain`."""
    return same_code(type(module).forward, plain)


def seen(module: nn.Module) -> bool:
    """Whether hooks want to see a call of the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
