"""The transformer's one attention function, and the choice of who computes it: another backend goes here alone.

A probe of what attends to what needs no change: forward hooks on a block's `attn.ln_q` and `attn.ln_k` see its queries
and keys, text and image apart. One module's attention is another by its own `backend`, a function.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit import cores

Computation = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Backend = str | Computation


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto", bias: Tensor | None = None) -> Tensor:
    """Softmax attention over all tokens, scaled by 1 / sqrt(head size).

    q: `(B, N, heads, head size)`; k, v: `(B, M, heads, head size)`. backend: of BACKENDS; `missing` tells whether it is
    there. Or a function of q, k, v and bias that gives `(B, N, heads, head size)`. bias: added to the scores, shape
    `(B, heads, N, M)` or one that spreads to it; or of truth values, False where nothing is to be gathered. Backends
    that know none, or no gradients, leave it to PyTorch's. Returns `(B, N, heads * head size)`.
    """
    if isinstance(backend, str):
        lacking = (bias is not None and backend in _WITHOUT_BIAS) or (backend == "cores" and _wants_gradients(q, k, v))
        plain = backend != "math" and (q.is_meta or lacking)
        compute: Computation = BACKENDS["sdpa" if plain else backend]
    else:
        compute = backend
    return rearrange(compute(q, k, v, bias), "b n h d -> b n (h d)")


def attention_by(model: nn.Module, backend: str) -> None:
    """Have the attention of a built model computed by one of BACKENDS from now on, but where a module has its own."""
    assert backend in BACKENDS, backend
    modules: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "backend", None), str)]
    for module in modules:
        module.backend = backend


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot be used for this device and dtype; None if it can."""
    half = dtype in (torch.float16, torch.bfloat16)
    package = {"flash": "flash_attn", "xformers": "xformers"}.get(name)
    if package is not None and find_spec(package) is None:
        return f"the package {package} is not installed"
    if (package or name == "cudnn") and device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if name in ("flash", "cudnn") and not half:
        return "it needs bf16 or fp16"
    if name == "cudnn" and not (torch.cuda.is_available() and torch.backends.cudnn.is_available()):
        return "this PyTorch has no cuDNN, or sees no GPU"
    if name == "cudnn" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if name == "cores" and not cores.available(device, dtype):
        return "it needs bf16 on a CPU whose oneDNN multiplies it"
    return None


# ---- the backends: q, k, v and bias as above to (B, N, heads, head size) --------------------------


def auto(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The fastest for what it is given: `cores` for bfloat16 on a CPU without gradients, else PyTorch's choice."""
    if q.device.type != "cpu":  # PyTorch's compiler knows that without a look into what follows, which it cannot read
        return sdpa(q, k, v, bias)
    many = q.shape[1] * k.shape[1] >= _MANY and cores.available(q.device, q.dtype)
    return cores.attend(q, k, v) if many and bias is None and not _wants_gradients(q, k, v) else sdpa(q, k, v, bias)


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n h d")


def by_cores(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
    return cores.attend(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, bias)


def flash(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
    return import_module("flash_attn").flash_attn_func(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
    return import_module("xformers.ops").memory_efficient_attention(q, k, v)


def math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula, in float32 at least; its table of scores `(B, heads, N, M)` is there as a whole."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), v.to(wide)).to(q.dtype)


BACKENDS: dict[str, Any] = {
    "auto": auto,
    "sdpa": sdpa,
    "cores": by_cores,
    "flash": flash,
    "xformers": xformers,
    "cudnn": cudnn,
    "math": math,
}
_WITHOUT_BIAS = ("cores", "flash", "xformers")
_MANY = 1 << 18  # scores of a head that are worth handing to another thread
