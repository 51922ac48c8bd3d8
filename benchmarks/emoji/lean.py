"""Attention and norms with fewer passes over memory, for training on CPUs only.

With a hundred tokens and a width of 256 a CPU with AMX multiplies the matrices in a third of a step; the rest is
elementwise work, most of it in PyTorch's composed forms of these two and in their gradients.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mmdit.attention import BACKENDS, attention_by


class _Attention(torch.autograd.Function):
    """Softmax attention of q, k, v `(B, H, N, d)`, its probabilities kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0.0, alpha=d**-0.5)
        p = scores.softmax(dim=-1)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v).view(b, h, n, d)

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, p = ctx.saved_tensors
        b, h, _, d = dy.shape
        dy = dy.reshape(b * h, -1, d)
        dv = torch.bmm(p.transpose(1, 2), dy)
        dp = torch.bmm(dy, v.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        zero = q.new_zeros(1, 1, 1)
        dq = torch.baddbmm(zero, ds, k, beta=0.0, alpha=d**-0.5)
        dk = torch.baddbmm(zero, ds.transpose(1, 2), q, beta=0.0, alpha=d**-0.5)
        return dq.view(b, h, -1, d), dk.view(b, h, -1, d), dv.view(b, h, -1, d)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As every backend of `mmdit.attention`; with a bias, PyTorch's."""
    if bias is not None:
        return BACKENDS["sdpa"](q, k, v, bias)
    y = _Attention.apply(*(t.transpose(1, 2) for t in (q, k, v)))
    return y.transpose(1, 2)  # type: ignore[union-attr]


def lean_attention(model: nn.Module) -> None:
    """Have the attention of a transformer inside `model` computed so."""
    BACKENDS["lean"] = attention
    attention_by(model, "lean")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # sums in float32 whatever x is
        inverse = (norm.float().square_() / size).add_(eps).rsqrt_().to(x.dtype)
        scaled = x * inverse
        ctx.save_for_backward(scaled, inverse, weight)
        return scaled * weight

    @staticmethod
    def backward(ctx, dy: Tensor):
        scaled, inverse, weight = ctx.saved_tensors
        product = dy * scaled
        dweight = product.flatten(0, -2).sum(0)
        mean = torch.matmul(product, weight[:, None]) / -scaled.shape[-1]  # (..., 1)
        dx = torch.addcmul(dy * weight, scaled, mean).mul_(inverse)
        return dx, dweight, None


def lean_norms(module: nn.Module) -> None:
    """Give every RMS norm inside `module` a forward and backward of few passes; same values within rounding."""
    for norm in module.modules():
        if type(norm).forward is nn.RMSNorm.forward and isinstance(norm, nn.RMSNorm):
            setattr(norm, "forward", partial(_apply, norm))  # noqa: B010


def _apply(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, norm.weight, norm.eps)  # type: ignore[return-value]
