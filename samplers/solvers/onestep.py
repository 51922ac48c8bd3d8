"""Solvers that remember nothing from one step to the next."""

import math
from itertools import pairwise

from torch import Tensor

from samplers.flow import Noise, Point, Solver, Solving, Step, solver


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


@solver(levels=lambda sigmas: sigmas[sigmas > 0])
def heun(x: Tensor, sigmas: Tensor) -> Solving:
    """Heun's method, of second order: an Euler step, then one by the mean of the velocities at both of its ends.

    Two evaluations a step, but one for a step to 0. Karras et al. 2022 (arXiv 2206.00364), algorithm 1; diffusers
    `FlowMatchHeunDiscreteScheduler`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = mean = yield Point(x, sigma)
        if sigma_next > 0:
            ahead = yield Point(x + (sigma_next - sigma) * velocity, sigma_next)
            mean = (velocity + ahead) / 2
        x = yield Step(i, sigma, velocity, x, x + (sigma_next - sigma) * mean)
    return x


def euler_ancestral(eta: float = 1.0) -> Solver:
    """Euler's method to below the next noise level, and back up to it with fresh noise; the form for flows.

    ComfyUI `sample_euler_ancestral_RF`: down to next (1 + eta (next / sigma - 1)), then latents and noise are mixed so
    that clean latents have the share 1 - next and all noise the variance next². A step to 0 is Euler's.
    eta: how far; 0 is Euler's method.
    """

    @solver()
    def solve(x: Tensor, sigmas: Tensor) -> Solving:
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            now, after = float(sigma), float(sigma_next)
            velocity = yield Point(x, sigma)
            down = after * (1 + eta * (after / now - 1))
            changed = x + (down - now) * velocity
            if eta > 0 and after > 0:
                kept = (1 - after) / (1 - down)
                changed = kept * changed + math.sqrt(after**2 - (kept * down) ** 2) * (yield Noise(x))
            x = yield Step(i, sigma, velocity, x, changed)
        return x

    return solve
