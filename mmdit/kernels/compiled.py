"""Compilation of a built transformer: once for all of its blocks, kept on disk by PyTorch for the next process.

On a GPU the whole of a block is compiled. On a CPU only what lies between the products is: PyTorch's own products and
attention are faster there than what its compiler makes of them. Weights are arguments of what is compiled, so they may
come and go, and change.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.common.errors import SettingsError
from mmdit.kernels.stock import forward_is
from mmdit.model import LayerNorm, MMDiT

_COMPILED = "of_mmdit"  # a mark on what is put in a block's place
_SHAPES = 64  # kinds of block times sizes and batches; past PyTorch's own limit, 8, the next would not be compiled


def compile_model(model: MMDiT, device: torch.device) -> None:
    """Have a built model compute by compiled code from now on; for each new shape the first step compiles it.

    A compiler that fails then is a SettingsError.
    """
    if device.type == "cpu":
        compile_norms(model)
    else:
        compile_blocks(model)


def lacking(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no compiler for {device.type}"
    if device.type == "cuda" and find_spec("triton") is None:
        return "it needs the package triton"
    if device.type == "cuda":  # Triton compiles in C what starts its kernels
        language, compilers = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        language, compilers = "C++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if not any(map(shutil.which, compilers)):
        return f"it needs a {language} compiler, and there is no {' or '.join(compilers)}"
    if not any(Path(folder, "Python.h").exists() for folder in _header_folders()):
        return "it needs Python's headers (Debian and Ubuntu have them in python3-dev), and there is no Python.h"
    return None


def _header_folders() -> list[str]:
    """Where a compiler looks for Python's headers: where PyTorch and Triton say, and where the user says."""
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    given = [os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")]
    return [sysconfig.get_path("include", scheme), *filter(None, os.pathsep.join(given).split(os.pathsep))]


def compile_blocks(model: MMDiT, **how: Any) -> None:
    """The blocks, one compilation for each of their kinds; how: as torch.compile takes it.

    What is compiled is each block's own forward, whatever its class has made of it; one that a block was given alone
    stays as it is.
    """
    from torch._dynamo import config  # here: it takes longer than all else before the first step

    config.cache_size_limit = max(config.cache_size_limit, _SHAPES)
    config.skip_nnmodule_hook_guards = False  # or hooks put on modules of a block after its first call would do nothing
    ways: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in model.get_submodule(model.layout.blocks or "").children():
        plain = type(block).forward
        if "forward" not in vars(block):
            ways.setdefault(plain, _block_by(plain, _telling(torch.compile(plain, **how))))
            block.forward = MethodType(ways[plain], block)


def _block_by(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, x: Tensor, *given: Any) -> Any:
        current = type(self).forward
        return compiled(self, x, *given) if current is plain and not x.is_meta else current(self, x, *given)

    forward.__dict__[_COMPILED] = True
    return forward


@contextmanager
def uncompiled(model: MMDiT) -> Iterator[None]:
    """Meanwhile blocks compute by their own code: for what changes from call to call, which each call would compile."""
    blocks = [
        block
        for block in model.get_submodule(model.layout.blocks or "").children()
        if hasattr(vars(block).get("forward"), _COMPILED)
    ]
    ways = [vars(block).pop("forward") for block in blocks]
    try:
        yield
    finally:
        for block, way in zip(blocks, ways):
            block.forward = way


def compile_norms(model: MMDiT) -> None:
    """The norms whose forward is the one written here; the others stay as they are."""
    for module in model.modules():
        if "forward" not in vars(module) and isinstance(module, LayerNorm) and forward_is(module, _plain_layer_norm):
            module.forward = MethodType(_layer_norm, module)
        if "forward" not in vars(module) and type(module).forward is nn.RMSNorm.forward:
            module.forward = MethodType(_rms_norm, module)


def _plain_layer_norm(self: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=1e-6), 1 + scale)


def _layer_norm(self: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if x.is_meta or not forward_is(self, _plain_layer_norm):
        return type(self).forward(self, x, shift, scale)
    return _compiled(_modulated)(x, shift, scale)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    if x.is_meta or type(self).forward is not nn.RMSNorm.forward:
        return type(self).forward(self, x)
    return _compiled(F.rms_norm)(x, self.weight.shape, self.weight, self.eps)


@cache
def _compiled(function: Any) -> Any:
    return _telling(torch.compile(function))


def _telling(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What is compiled when it is first called; SettingsError where that fails."""

    def call(*given: Any) -> Any:
        try:
            return compiled(*given)
        except RuntimeError as error:
            inner = getattr(error, "inner_exception", None)  # PyTorch's compilers wrap what went wrong
            if inner is None or isinstance(inner, torch.OutOfMemoryError | MemoryError):
                raise
            lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [type(inner).__name__]
            said = next((line for line in lines if "error:" in line), lines[0])
        raise SettingsError(f"compile: the compiler failed: {said}; without --compile none is needed")

    return call
