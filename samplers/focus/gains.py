"""How hard a step is pushed along a cost's gradient: over the steps, apart from the scale that the user gives.

The velocity becomes velocity + scale * gain * gradient; sigma falls, so the latents go down the cost. t = 1 - sigma is
the part of the way that is done. The control that FOCUS derives is (1 - t) sigma_m^2 gradient (Bill et al. 2025, arXiv
2510.02315), where sigma_m^2 = 2 (1 - t) / t is the noise of a flow without memory (Domingo-Enrich et al. 2024, arXiv
2409.08861); it has no limit where t is 0, and there a picture begins.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BOUND = 1e-3  # what FOCUS's authors add to t


class Push(NamedTuple):
    """A point at which a velocity is to be pushed."""

    sigma: float  # the share of noise, 1 to 0
    height: float  # by how much this step lowers it, above 0
    velocity: Tensor  # (B, ...)
    gradient: Tensor  # of the cost, shaped as the velocity


Gain = Callable[[Push], float | Tensor]  # a number, or one for each picture, (B, 1, ...)


def code(at: Push) -> float:
    """As the authors' program: 2002 at the start, so that of 28 steps the first has 78 % of all that is pushed."""
    return at.sigma * _noise(at.sigma, _BOUND)


def memoryless(at: Push) -> float:
    """Half of `code`: the control enters the flow's equation by half of what it has in the one with noise."""
    return code(at) / 2


def unit(at: Push) -> float:
    """1 - t alone, without the noise."""
    return at.sigma


def step(at: Push) -> float:
    """As `code`, but t is bounded by the step's own height, so that no step pushes more than 2 (1 + height).

    More steps still push more, as the logarithm of their number: that lies in 1 / t.
    """
    return at.sigma * _noise(at.sigma, at.height)


def relative(at: Push) -> Tensor:
    """The gradient is brought to the length of the velocity, times 1 - t, in each picture; nothing where it is 0.

    How steep the cost is does not count, nor does the number of steps. A scale of 1 is much: as long as the velocity.
    """
    dims = tuple(range(1, at.gradient.ndim))
    velocity, gradient = (
        torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in (at.velocity, at.gradient)
    )
    return at.sigma * (velocity / gradient).where(gradient > 0, 0)


GAINS: dict[str, Gain] = {
    "code": code,
    "memoryless": memoryless,
    "unit": unit,
    "step": step,
    "relative": relative,
}


def _noise(sigma: float, bound: float) -> float:
    """sigma_m^2 with t and 1 - t both raised by a bound."""
    return 2 * (sigma + bound) / (1 - sigma + bound)
