"""Noise of a seed, and between two seeds'."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from samplers.flow import Source
from samplers.philox import CudaNoise


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


def generator_of(seed: int, rng: str) -> Callable[[tuple[int, ...]], Tensor]:
    """Normal numbers of a shape, float32; each call goes on where the last ended."""
    if rng == "cuda":
        return CudaNoise(seed)
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def going_on(seed: int, like: Tensor, rng: str = "cpu") -> Source:
    """Noise that goes on where the starting latents `(1, ...)` of this seed, shaped as `like`, end."""

    @cache  # most solvers ask for none
    def draw() -> Callable[[tuple[int, ...]], Tensor]:
        generator = generator_of(seed, rng)
        generator(like.shape[1:])
        return generator

    return lambda x: draw()(x.shape[1:])[None].to(x)
