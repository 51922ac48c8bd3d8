"""Adjoint matching: a flow learns to lower a cost along its way, and to stay near what it was.

Domingo-Enrich et al. 2024 (arXiv 2409.08861), with a running cost in the place of a final one as in FOCUS (Bill et al.
2025, arXiv 2510.02315). In time t = 1 - sigma, from noise at 0 to a picture at 1, with the velocity v = dX/dt, which is
minus the network's, pictures are drawn by the memoryless stochastic equation of the flow

    dX = (2 v - X / t) dt + s dW,    s^2 = 2 (1 - t) / t,

and v is to minimise the mean of the integral of |u|^2 / 2 + f, where u = (2 / s) (v - v_base) and f is the cost. At the
minimum u = -s a. a, the lean adjoint, is how f further on changes with X, by the base's own drift alone.

Everything is written for steps X' = keep X + gain v + noise xi, whatever they are. a is the exact gradient of the steps
that are taken: a_k = keep a_{k+1} + gain (dv_base/dX)^T a_{k+1} + h df/dX, all at the point X_k where step k begins.

Nothing here knows a network: tensors are float32 `(B, ...)`, of B trajectories.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_EARLY = 0.3  # time until which steps are exact in the noise


class Step(NamedTuple):
    """A step of the stochastic equation: X' = keep X + gain v + noise xi, xi drawn from N(0, 1)."""

    sigma: float  # where it begins
    height: float  # by how much it lowers that
    keep: float
    gain: float
    noise: float

    @property
    def control(self) -> float:
        """What a difference of velocities counts as control: 2 / s, in a small step."""
        return self.gain / (self.noise * math.sqrt(self.height))

    @property
    def spread(self) -> float:
        """s, in a small step."""
        return self.noise / math.sqrt(self.height)


def steps_of(sigmas: Sequence[float]) -> list[Step]:
    """The steps between falling noise levels, 1 the first and 0 the last.

    Both s and 1 / t are infinite at the start, where Euler's step is of no use. Until t = 0.3 a step is what the
    equation does to a flow whose predicted picture stays as it is (the ancestral step of Ho et al. 2020, arXiv
    2006.11239); thereafter Euler's, with t + h in the place of t below the fraction lines. For data from
    N(0, 0.775^2), whose velocity is known, in 28 steps with shift 3, the deviation relative to the exact one: after
    steps 1 and 2, at the end, the largest and the least (`tests/test_adjoint.py`):

        Euler, with t + 0.001, as released     12.86  1.42   0.98   12.86  0.98
        Euler, with t + h                       1.43  1.23   0.99    1.43  0.99
        ancestral                               1.00  1.00   0.86    1.00  0.86
        ancestral until 0.3, then Euler         1.00  1.00   0.98    1.02  0.98
    """
    steps = []
    for above, below in pairwise(sigmas):
        t, after, h = 1 - above, 1 - below, above - below
        if t < _EARLY and below > 0:
            back = t / after * (below / above) ** 2
            left = math.sqrt(above**2 - (t / after * below) ** 2)  # noise of X given X'
            steps.append(Step(above, h, after - back * t + back, (after - back * t) * above, below / above * left))
        else:
            steps.append(Step(above, h, 1 - h / (t + h), 2 * h, math.sqrt(h * 2 * above / (t + h))))
    return steps


class Seen(NamedTuple):
    """What is found at the point where a step begins."""

    velocity: Tensor  # (B, ...), dX/dt
    costs: Tensor  # (B,)
    slopes: Tensor  # (B, ...), of each trajectory's cost


class Trajectories(NamedTuple):
    points: list[Tensor]  # (B, ...), where each step begins
    costs: Tensor  # (K, B), there
    slopes: list[Tensor]  # (B, ...)


def drawn(
    steps: Sequence[Step], start: Tensor, see: Callable[[int, Tensor], Seen], noise: Callable[[], Tensor]
) -> Trajectories:
    """Trajectories from noise `start`. see: of step k and a point, by the flow that learns. noise: draws xi."""
    x, points, costs, slopes = start, [], [], []
    for k, step in enumerate(steps):
        seen = see(k, x)
        points.append(x)
        costs.append(seen.costs)
        slopes.append(seen.slopes)
        if k + 1 < len(steps):  # nothing is asked of where the last one leads
            x = step.keep * x + step.gain * seen.velocity + step.noise * noise()
    return Trajectories(points, torch.stack(costs), slopes)


def adjoints(
    steps: Sequence[Step], way: Trajectories, pull: Callable[[int, Tensor, Tensor], Tensor], scale: float = 1.0
) -> list[Tensor]:
    """The lean adjoint where each step but the last ends: `[a_1, ..., a_{K-1}]`; a_K, of no final cost, is 0.

    pull: of step k, its point and a: (dv/dX)^T a, of the base. scale: of the cost.
    """
    a = scale * steps[-1].height * way.slopes[-1]
    found = [a]
    for k in range(len(steps) - 2, 0, -1):
        step = steps[k]
        a = step.keep * a + step.gain * pull(k, way.points[k], a) + scale * step.height * way.slopes[k]
        found.append(a)
    return found[::-1]


def mismatch(step: Step, learning: Tensor, base: Tensor, adjoint: Tensor) -> Tensor:
    """|u + s a|^2 at a step, elementwise: of velocities dX/dt, and the adjoint where the step ends."""
    return (step.control * (learning - base) + step.spread * adjoint).square()
