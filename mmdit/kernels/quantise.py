"""The matrices of the transformer's blocks in 8 bits: half their memory, at a price in exactness that the user chose.

Every row of a matrix is divided by a scale of its own, so that its largest number becomes the largest of the format,
and rounded: to whole numbers (int8) or to e4m3 (fp8). A layer turns its matrix back into the number format of the run
when it is called. Norms, biases, embeddings, modulations and the final layer stay as they are.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.common.layout import Layout
from weights import Source

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SCALE = ".weight_scale"
_TINY = 1e-12  # the scale of a row of zeros


class QuantisedLinear(nn.Module):
    """A linear layer whose matrix is stored in 8 bits; names and shapes of weight and bias are those of nn.Linear."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        device = linear.weight.device
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(rows, device=device), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.weight_scale[:, None]  # (rows, columns), float32: scales are small
        return F.linear(x, weight.to(x.dtype), self.bias)


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """Give the blocks of a transformer, on "meta", layers for 8-bit matrices, in place.

    What is used before the loop is left out, and linear layers with a forward of their own. kind: of FORMATS.
    Returns the model.
    """
    layout: Layout = model.layout  # pyright: ignore[reportAssignmentType]
    before = re.compile(rf"(?:{layout.before})\..+" if layout.before else r"(?!)")
    for name, module in list(model.named_modules()):
        plain = type(module).forward is nn.Linear.forward
        if plain and name.startswith(f"{layout.blocks}.") and not before.fullmatch(name):
            assert isinstance(module, nn.Linear)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, QuantisedLinear(module, FORMATS[kind]))
    return model


class QuantisedSource(Source):
    """The tensors of a transformer under adapters, if any, then quantised; `original` and `put` know plain ones."""

    def __init__(self, plain: Source, model: nn.Module) -> None:
        """model: as `quantised` returns it."""
        self._plain = plain
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._dtypes = {name: t.dtype for name, t in state.items() if name.removesuffix("_scale") + "_scale" in state}
        self.original, self.put = plain.original, plain.put

    def __call__(self, name: str) -> Tensor:
        if name not in self._dtypes:
            return self._plain(name)
        weight = self._plain(name.removesuffix("_scale"))
        scale = scales(weight, self._dtypes[name.removesuffix("_scale")])
        return scale if name.endswith(_SCALE) else rounded(weight, scale, self._dtypes[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name] if name in self._dtypes else self._plain.dtype(name)

    @property
    def put_bytes(self) -> int:
        return self._plain.put_bytes

    def is_put(self, name: str) -> bool:
        return name not in self._dtypes and self._plain.is_put(name)

    def is_mapped(self, name: str) -> bool:
        return name not in self._dtypes and self._plain.is_mapped(name)


def scales(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What each row of a matrix `(rows, columns)` is divided by, `(rows,)` in float32."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    return (weight.float().abs().amax(dim=1) / largest).clamp(min=_TINY)


def rounded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in 8 bits: weight = stored * scale, nearly."""
    stored = weight.float() / scale[:, None]
    return (stored if dtype.is_floating_point else stored.round()).to(dtype)
