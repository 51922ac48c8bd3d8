"""Solvers that replace noise as they go: of the stochastic equation that gives the same distribution as the flow.

They step in lambda = log((1 - sigma) / sigma), in which the share of the clean latents counts too. At sigma 1 it is not
finite: a first level of 1 is asked for a little below, where ComfyUI does with the shift 3 (`percent_to_sigma(1e-4)`).
"""

import math
from itertools import pairwise

from torch import Tensor

from samplers.flow import Noise, Point, Solver, Solving, Step, solver

_ALMOST_NOISE = 2.9997 / 2.9998  # 3 t / (1 + 2 t) at t = 0.9999


def _finite(sigmas: Tensor) -> Tensor:
    if sigmas[0] < 1:
        return sigmas
    sigmas = sigmas.clone()
    sigmas[0] = max(_ALMOST_NOISE, (1 + float(sigmas[1])) / 2)
    return sigmas


def _levels(sigmas: Tensor) -> Tensor:
    return _finite(sigmas)[:-1]


def _half_log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def dpmpp_2m_sde(eta: float = 1.0) -> Solver:
    """SDE-DPM-Solver++(2M), of second order where there is no noise; one evaluation a step.

    Lu et al. 2022 (arXiv 2211.01095), section 5: SDE-DPM-Solver++ with one value before, at the midpoint. A step to 0
    gives the clean latents. ComfyUI `sample_dpmpp_2m_sde`; diffusers `DPMSolverMultistepScheduler` with
    `algorithm_type="sde-dpmsolver++"` and flow sigmas.
    eta: how much noise is replaced; 1 is the equation of the paper, 0 its deterministic solver.
    """

    @solver(_levels)
    def solve(x: Tensor, sigmas: Tensor) -> Solving:
        sigmas, last, h_last = _finite(sigmas), None, 0.0
        for i, (now, after) in enumerate(pairwise(sigmas.tolist())):
            velocity = yield Point(x, sigmas[i])
            moved = clean = x - now * velocity
            if after > 0:
                h = _half_log_snr(after) - _half_log_snr(now)
                gained = (1 - after) * -math.expm1(-(1 + eta) * h)
                moved = after / now * math.exp(-eta * h) * x + gained * clean
                if last is not None:
                    moved = moved + gained * h / (2 * h_last) * (clean - last)
                if eta > 0:
                    moved = moved + after * math.sqrt(-math.expm1(-2 * eta * h)) * (yield Noise(x))
                last, h_last = clean, h
            x = yield Step(i, sigmas[i], velocity, x, moved)
        return x

    return solve


def dpmpp_3m_sde(eta: float = 1.0) -> Solver:
    """SDE-DPM-Solver++(3M): clean latents by a parabola through the last three; one evaluation a step.

    As k-diffusion and ComfyUI have it (`sample_dpmpp_3m_sde`), after the third-order multistep of DPM-Solver++ (Lu et
    al. 2022, arXiv 2211.01095). The weight of its second difference is half of what third order takes, so it is of
    second order. diffusers' `sde-dpmsolver++` of third order has another sign there.
    eta: as of `dpmpp_2m_sde`.
    """

    @solver(_levels)
    def solve(x: Tensor, sigmas: Tensor) -> Solving:
        sigmas, seen, steps = _finite(sigmas), list[Tensor](), list[float]()  # the newest first
        for i, (now, after) in enumerate(pairwise(sigmas.tolist())):
            velocity = yield Point(x, sigmas[i])
            moved = clean = x - now * velocity
            if after > 0:
                h = _half_log_snr(after) - _half_log_snr(now)
                whole = (1 + eta) * h
                moved = after / now * math.exp(-eta * h) * x + (1 - after) * -math.expm1(-whole) * clean
                phi2 = math.expm1(-whole) / whole + 1
                phi3 = phi2 / whole - 0.5
                if len(seen) == 1:
                    moved = moved + (1 - after) * phi2 * h / steps[0] * (clean - seen[0])
                if len(seen) == 2:
                    r0, r1 = steps[0] / h, steps[1] / h
                    near, far = (clean - seen[0]) / r0, (seen[0] - seen[1]) / r1
                    second = (near - far) / (r0 + r1)
                    moved = moved + (1 - after) * (phi2 * (near + r0 * second) - phi3 * second)
                if eta > 0:
                    moved = moved + after * math.sqrt(-math.expm1(-2 * eta * h)) * (yield Noise(x))
                seen, steps = [clean, *seen[:1]], [h, *steps[:1]]
            x = yield Step(i, sigmas[i], velocity, x, moved)
        return x

    return solve
