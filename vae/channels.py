"""Group norms that keep the layout in which convolutions in 16 bits are fastest: channels last.

PyTorch's own gives it up on a GPU: it copies its input into the usual layout, and the convolution behind it copies that
back. Here batch norm's kernels, which work in either layout, find mean and variance of each channel; those of the
groups follow as in strips (`vae.maps`).
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.autoencoder import GroupNorm
from vae.maps import UPDATE_STATS, whole_norm


def keep_channels_last(vae: nn.Module) -> None:
    """Have the group norms of a built autoencoder computed so where their input is in 16 bits and channels last.

    A norm with another forward stays as it is, and so does one that gradients go through.
    """
    for module in vae.modules():
        if isinstance(module, GroupNorm) and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)


def _forward(self: GroupNorm, x: Tensor) -> Tensor:
    plain = type(self).forward
    return group_norm(x, self) if plain is nn.GroupNorm.forward and _suits(self, x) else plain(self, x)


def _suits(norm: GroupNorm, x: Tensor) -> bool:
    gradients = torch.is_grad_enabled() and (x.requires_grad or norm.weight.requires_grad)
    narrow = x.device.type in UPDATE_STATS and x.ndim == 4 and x.dtype.itemsize == 2
    return narrow and x.is_contiguous(memory_format=torch.channels_last) and not gradients


def group_norm(x: Tensor, norm: GroupNorm) -> Tensor:
    """The norm of maps `(B, C, h, w)`, which lie channels last, as the result does: by float32, rounded once."""
    if len(x) == 1:
        return _normed(x, norm)
    y = torch.empty_like(x)
    for one, result in zip(x.split(1), y.split(1)):
        result.copy_(_normed(one, norm))
    return y


def _normed(x: Tensor, norm: GroupNorm) -> Tensor:
    whole = whole_norm(x, norm)
    return F.batch_norm(x, whole.mean, whole.variance, whole.weight, whole.bias, eps=whole.eps)
