"""Euler's method for the flow d x / d sigma = velocity(x, sigma)."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from samplers.guidance import Velocity


class Step(NamedTuple):
    """What a callback sees after each step."""

    index: int  # 0 to steps - 1
    sigma: Tensor  # the noise level that the step began at
    velocity: Tensor  # the velocity there, after guidance, shaped as x
    x: Tensor  # the latents after the step


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callable[[Step], None] | None = None) -> Tensor:
    """Integrate from noise at `sigmas[0]` to the picture at `sigmas[-1]`, one evaluation a step.

    Esser et al. 2024 (arXiv 2403.03206), equation 1; Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its
    correction.

    velocity: takes x and a scalar sigma. x: latents at `sigmas[0]`, of any shape; keep them in float32, since the
    small last steps would drown in a shorter type. sigmas: falling, `(steps + 1,)`. callback: called after each step;
    what it raises ends the run.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        x = x + (sigma_next - sigma) * v
        if callback is not None:
            callback(Step(i, sigma, v, x))
    return x
