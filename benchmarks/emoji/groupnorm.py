"""Group norm with a faster backward pass on CPUs, for training only.

PyTorch's own backward took half of the autoencoder's training step; written as per-channel sums and one
multiply-add over the tensor it takes a fifth of that. The forward pass is PyTorch's.
"""

from functools import partial

import torch
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight.to(x.dtype), bias.to(x.dtype), b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        groups = mean.shape[1]
        x, dy = (t.permute(0, 2, 3, 1).reshape(b, h * w, c) for t in (x, dy))  # (B, HW, C)
        ones = torch.ones(1, 1, h * w, dtype=x.dtype).expand(b, -1, -1)
        sum_dy = torch.bmm(ones, dy).float().view(b, groups, -1)  # (B, G, C / G)
        sum_dy_x = torch.bmm(ones, dy * x).float().view(b, groups, -1)
        gamma = weight.float().view(1, groups, -1)
        mean, rstd = mean[..., None], rstd[..., None]  # (B, G, 1)
        sum_dy_xhat = rstd * (sum_dy_x - mean * sum_dy)
        count = h * w * (c // groups)
        offset = (gamma * sum_dy).sum(2, keepdim=True) / count
        slope = (gamma * sum_dy_xhat).sum(2, keepdim=True) / count
        # dx = rstd * (gamma * dy - offset - xhat * slope), gathered into three per-channel factors.
        of_dy = (rstd * gamma).view(b, 1, c).to(x.dtype)
        of_x = (-rstd * rstd * slope).expand_as(sum_dy).reshape(b, 1, c).to(x.dtype)
        constant = (rstd * rstd * slope * mean - rstd * offset).expand_as(sum_dy).reshape(b, 1, c).to(x.dtype)
        dx = torch.addcmul(torch.addcmul(constant, of_x, x), of_dy, dy)
        dx = dx.view(b, h, w, c).permute(0, 3, 1, 2)
        return dx, sum_dy_xhat.sum(0).view(c), sum_dy.sum(0).view(c), None, None


def speed_up(module: nn.Module) -> None:
    """Give every group norm inside `module` the faster backward pass; values stay the same within rounding."""
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            faster = partial(_apply, norm)
            setattr(norm, "forward", faster)  # noqa: B010


def _apply(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[return-value]
