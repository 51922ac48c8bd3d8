"""Solvers of the flow d x / d sigma = velocity(x, sigma)."""

from itertools import pairwise

from torch import Tensor

from samplers.flow import Point, Solver, Solving, Step, solver


@solver()
def euler(x: Tensor, sigmas: Tensor) -> Solving:
    """Euler's method: from noise at `sigmas[0]` to the picture at `sigmas[-1]`, one evaluation a step.

    Esser et al. 2024 (arXiv 2403.03206), equation 1; Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its
    correction.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = yield Point(x, sigma)
        x = yield Step(i, sigma, velocity, x, x + (sigma_next - sigma) * velocity)
    return x


SOLVERS: dict[str, Solver] = {"euler": euler}
