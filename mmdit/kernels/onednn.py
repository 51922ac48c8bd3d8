"""Linear layers by oneDNN's own function, for bfloat16 on CPUs: with the bias added and GELU applied on the way out.

PyTorch's `linear` first copies the bias into the result, and GELU reads and writes it once more, as slowly as a tenth
of the products take. The weights stay what and where they are.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.cores import available
from mmdit.kernels.stock import forward_is, seen
from mmdit.model import MLP


def by_onednn(model: nn.Module) -> None:
    """Have the linear layers of a built model computed so where the input is bfloat16 on a CPU, without gradients.

    Those with a forward of their own, and MLPs whose forward is another than `plain_mlp`, stay as they are.
    The result is nearer to the exact one by the roundings that are left out.
    """
    for module in model.modules():
        if type(module).forward is nn.Linear.forward:
            module.forward = MethodType(linear, module)
        if isinstance(module, MLP) and forward_is(module, plain_mlp):
            module.forward = MethodType(mlp, module)


def linear(self: nn.Linear, x: Tensor) -> Tensor:
    forward = type(self).forward
    return fused(self, x, "none", "") if forward is nn.Linear.forward and suits(self, x) else forward(self, x)


def plain_mlp(self: MLP, x: Tensor) -> Tensor:
    return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def mlp(self: MLP, x: Tensor) -> Tensor:
    """What `plain_mlp` gives, the first layer and GELU in one."""
    first: Any = self.fc1
    ours = getattr(vars(first).get("forward"), "__func__", None) is linear
    plain = ours and type(first).forward is nn.Linear.forward and not seen(first)
    if plain and forward_is(self, plain_mlp) and suits(first, x):
        return self.fc2(fused(first, x, "gelu", "tanh"))
    return type(self).forward(self, x)


def suits(layer: nn.Linear, x: Tensor) -> bool:
    gradients = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
    return available(x.device, x.dtype) and not gradients


def fused(layer: nn.Linear, x: Tensor, after: str, algorithm: str) -> Tensor:
    function: Any = torch.ops.mkldnn._linear_pointwise
    return function(x, layer.weight, layer.bias, after, [], algorithm)
