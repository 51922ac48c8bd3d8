"""Linear layers by oneDNN's own function, for bfloat16 on CPUs: with the bias added and GELU applied on the way out.

PyTorch's `linear` first copies the bias into the result, and GELU reads and writes it once more, as slowly as a tenth
of the products take. The weights stay what and where they are.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.cores import available
from mmdit.model import MLP


def by_onednn(model: nn.Module) -> None:
    """Have every linear layer of a built model computed so where the input is bfloat16 on a CPU, without gradients.

    The result is nearer to the exact one by the roundings that are left out.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(linear, module)
        if isinstance(module, MLP) and isinstance(module.fc1, nn.Linear):
            module.forward = MethodType(mlp, module)


def linear(self: nn.Linear, x: Tensor) -> Tensor:
    return fused(self, x, "none", "") if suits(self, x) else nn.Linear.forward(self, x)


def mlp(self: MLP, x: Tensor) -> Tensor:
    return self.fc2(fused(self.fc1, x, "gelu", "tanh")) if suits(self.fc1, x) else MLP.forward(self, x)


def suits(layer: nn.Linear, x: Tensor) -> bool:
    gradients = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
    return available(x.device, x.dtype) and not gradients


def fused(layer: nn.Linear, x: Tensor, after: str, algorithm: str) -> Tensor:
    function: Any = torch.ops.mkldnn._linear_pointwise
    return function(x, layer.weight, layer.bias, after, [], algorithm)
