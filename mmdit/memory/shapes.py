"""What the most frequent operations give on "meta", told from their arguments.

PyTorch has these operations' shapes in Python, a tenth of a millisecond to half a one for each; running a transformer's
step without memory took five sixths of its time there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def quick(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func(*args, **kwargs)` gives, or None where it is not one of the operations or its arguments not as usual.

    func: an operator as a dispatch mode is given it.
    """
    give = _GIVEN.get(func)
    if give is None or any(isinstance(value, Tensor | torch.dtype | complex) for value in kwargs.values()):
        return None
    given = list(_tensors(args))
    if not given or any(isinstance(value, complex) for value in args) or not all(map(_usual, given)):
        return None
    if give is not _elementwise and any(tensor.dtype != given[0].dtype for tensor in given):
        return None
    return give(*args)


def _usual(tensor: Tensor) -> bool:
    """Of numbers that are promoted as numbers are, not empty, and not spread over a dimension of one place."""
    if not tensor.is_meta or tensor.dtype not in _DTYPES:
        return False
    return all(size > 1 or (size and step) for size, step in zip(tensor.shape, tensor.stride()))


def _alike(x: Tensor, *_: Any) -> Tensor:
    """As it is, in memory too, less its gaps."""
    return torch.empty_like(x)


def _elementwise(*args: Any) -> Tensor | None:
    """As large as the largest of the tensors, with which the others are broadcast."""
    given = list(_tensors(args))
    if len(given) == 1:
        return _alike(given[0])
    largest = max(given, key=lambda tensor: (tensor.ndim, tensor.numel()))
    dtype = largest.dtype
    if not largest.is_contiguous():
        return None
    for tensor in given:
        if tensor is largest:
            continue
        if not all(m in (n, 1) for m, n in zip(tensor.shape[::-1], largest.shape[::-1])):
            return None
        steps = [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]
        if steps != sorted(steps, reverse=True):  # whose order the result would have is not said here
            return None
        if tensor.dtype != largest.dtype and not tensor.ndim:  # one number counts less than many
            return None
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.empty_like(largest, dtype=dtype)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> tuple[Tensor, ...] | None:
    """The tensor, with the mean and the inverse deviation of each of its rows, in float32 at least."""
    given = (x.shape[-len(shape) :], *(tensor.shape for tensor in (weight, bias) if tensor is not None))
    if not shape or not x.is_contiguous() or any(list(found) != list(shape) for found in given):
        return None
    rows = (*x.shape[: -len(shape)], *(1 for _ in shape))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _addmm(bias: Tensor, one: Tensor, other: Tensor) -> Tensor | None:
    """A row for each of the one's, a column for each of the other's."""
    fits = one.ndim == other.ndim == 2 and one.shape[1] == other.shape[0] and bias.shape == other.shape[1:]
    return one.new_empty(one.shape[0], other.shape[1]) if fits else None


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor | None:
    """Without the dimensions, or with 1 in their places."""
    if not dims or not x.is_contiguous() or not all(-x.ndim <= dim < x.ndim for dim in dims):
        return None
    gone = {dim % x.ndim for dim in dims}
    if len(gone) < len(dims):
        return None
    shape = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone]
    return x.new_empty(shape)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GIVEN: dict[Any, Callable[..., Any]] = {
    _aten.native_layer_norm.default: _layer_norm,
    _aten.addmm.default: _addmm,
    _aten.mean.dim: _mean,
    _aten.add.Tensor: _elementwise,
    _aten.mul.Tensor: _elementwise,
    _aten.addcmul.default: _elementwise,
    _aten.gelu.default: _alike,
    _aten.silu.default: _alike,
    _aten.rsqrt.default: _alike,
    _aten.pow.Tensor_Scalar: _alike,
}
