"""Compilation of a built transformer: once for all of its blocks, kept on disk by PyTorch for the next process.

On a GPU the whole of a block is compiled. On a CPU only what lies between the products is: PyTorch's own products and
attention are faster there than what its compiler makes of them. Weights are arguments of what is compiled, so they may
come and go, and change.
"""

import os
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.model import JointBlock, LayerNorm, MMDiT

_SHAPES = 64  # kinds of block times sizes and batches; past PyTorch's own limit, 8, the next would not be compiled


def compile_model(model: MMDiT, device: torch.device) -> None:
    """Have a built model compute by compiled code from now on; for each new shape the first step compiles it."""
    if device.type == "cpu":
        compile_norms(model)
    else:
        compile_blocks(model)


def lacking(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device; None if it can."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type not in ("cpu", "cuda"):
        return f"there is no compiler for {device.type}"
    if device.type == "cuda" and find_spec("triton") is None:
        return "it needs the package triton"
    return None if shutil.which(compiler) else f"it needs a C++ compiler, and there is no {compiler}"


def compile_blocks(model: MMDiT, **how: Any) -> None:
    """The blocks, one compilation for each of their kinds; how: as torch.compile takes it."""
    from torch._dynamo import config  # here: it takes longer than all else before the first step

    config.cache_size_limit = max(config.cache_size_limit, _SHAPES)
    forward = torch.compile(JointBlock.forward, **how)
    for block in model.joint_blocks:
        block.forward = MethodType(forward, block)


def compile_norms(model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.forward = MethodType(_layer_norm, module)
        if isinstance(module, nn.RMSNorm):
            module.forward = MethodType(_rms_norm, module)


def _layer_norm(_: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _compiled(_modulated)(x, shift, scale)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    return _compiled(F.rms_norm)(x, self.weight.shape, self.weight, self.eps)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
