"""Noise between two seeds'."""

import torch
from torch import Tensor


def spherical(one: Tensor, other: Tensor, share: float) -> Tensor:
    """From noise (B, ...) to other noise by a share of the way, 0 to 1, along the arc between them.

    So it stays as long as noise is, which a straight line would not. Shoemake 1985 ("Animating rotation with
    quaternion curves"), for each picture as a whole; at either end it is that noise exactly.
    """
    if share in (0, 1):
        return other if share else one
    a, b = one.double().flatten(1), other.double().flatten(1)  # (B, N)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()[:, None]
    if float(angle.sin().min()) < 1e-6:  # the same noise twice
        return torch.lerp(one, other, share)
    mixed = ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b
    return mixed.reshape(one.shape).to(one.dtype)
