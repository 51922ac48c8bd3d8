"""Multistep solvers that take the noise out exactly, and the clean latents for a polynomial of lambda = -log sigma.

With the clean latents D = x - sigma velocity the flow is d x / d lambda = D - x. From level s to t, h = log(s / t), x_t
is e^-h x_s and the integral of e^(tau - h) D over tau from 0 to h. Where D stays as it is, that is Euler's step. So
each solver is Euler's step and a correction by how D changed.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from samplers.flow import Point, Solving, Step, solver


@solver()
def dpmpp_2m(x: Tensor, sigmas: Tensor) -> Solving:
    """DPM-Solver++(2M), of second order, as Stability AI's own program has it; one evaluation a step.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with alpha = 1: D in the middle of the step is extrapolated. The
    first step and one to 0 are Euler's. Stability AI, sd3.5 `sample_dpmpp_2m`; k-diffusion and ComfyUI have the same.
    diffusers' `DPMSolverMultistepScheduler` computes the same on sigmas that are no flow's; with `use_flow_sigmas` its
    lambda is log((1 - sigma) / sigma), as that of `dpmpp_2m_sde` with eta 0.
    """
    levels, last = sigmas.tolist(), None
    for i, (now, after) in enumerate(pairwise(levels)):
        velocity = yield Point(x, sigmas[i])
        clean, moved = x - now * velocity, x + (after - now) * velocity
        if last is not None and after > 0:
            ratio = math.log(now / after) / math.log(levels[i - 1] / now)
            moved = moved + (1 - after / now) * ratio / 2 * (clean - last)
        last = clean
        x = yield Step(i, sigmas[i], velocity, x, moved)
    return x


@solver()
def res_multistep(x: Tensor, sigmas: Tensor) -> Solving:
    """The second-order multistep exponential integrator of RES; one evaluation a step.

    Zhang et al. 2023 (arXiv 2308.02157), multistep, with c2 = -h_last / h: weights of D and of D before are
    phi1 - phi2 / c2 and phi2 / c2 at -h. The first step and one to 0 are Euler's. ComfyUI `res_multistep`; diffusers'
    `DPMSolverMultistepScheduler` computes the same by `solver_type="heun"`, on sigmas that are no flow's.
    """
    levels, last = sigmas.tolist(), None
    for i, (now, after) in enumerate(pairwise(levels)):
        velocity = yield Point(x, sigmas[i])
        clean, moved = x - now * velocity, x + (after - now) * velocity
        if last is not None and after > 0:
            h = math.log(now / after)
            second = h + math.expm1(-h)  # h² phi2(-h)
            moved = moved + second / math.log(levels[i - 1] / now) * (clean - last)
        last = clean
        x = yield Step(i, sigmas[i], velocity, x, moved)
    return x


@solver()
def unipc(x: Tensor, sigmas: Tensor) -> Solving:
    """UniPC of third order: each step is corrected by the evaluation that the next one begins with.

    Zhao et al. 2023 (arXiv 2302.04867), the multistep UniP and UniC for predicted clean latents with B(h) = e^h - 1
    ("bh2"). The order rises with the steps done, and falls to 1 with those left, so that a step to 0 is Euler's.
    diffusers' `UniPCMultistepScheduler` computes the same with `solver_order=3` on sigmas that are no flow's; with
    `use_flow_sigmas` its lambda is log((1 - sigma) / sigma). ComfyUI ends at 0.001 in place of 0.
    """
    levels, steps = sigmas.tolist(), len(sigmas) - 1
    seen: list[Tensor] = []  # the clean latents of the last steps, the newest first
    correct = None
    for i, (now, after) in enumerate(pairwise(levels)):
        velocity = yield Point(x, sigmas[i])
        clean, before = x - now * velocity, x
        if correct is not None:
            x = correct(x, clean)
        seen = [clean, *seen[:2]]
        order = min(3, i + 1, steps - i)
        moved = after / now * x + (1 - after / now) * clean
        correct = None
        if i + 1 < steps:  # after is above 0
            moved, correct = _predicted(moved, seen[:order], levels[i - order + 1 : i + 2])
        x = yield Step(i, sigmas[i], velocity, before, moved)
    return x


Correct = Callable[[Tensor, Tensor], Tensor]


def _predicted(moved: Tensor, seen: list[Tensor], levels: list[float]) -> tuple[Tensor, Correct]:
    """UniP's step, and the function that corrects it by UniC once the clean latents at its end are known.

    moved: Euler's step. seen: clean latents, newest first. levels: where they were seen, oldest first, and the next.
    """
    *_, now, after = levels
    h = math.log(now / after)
    ratios = [math.log(now / level) / h for level in reversed(levels[:-2])]  # negative
    rates = [(other - seen[0]) / ratio for other, ratio in zip(seen[1:], ratios)]
    scale = -math.expm1(-h)
    forward, back = _weights(ratios, h), _weights([*ratios, 1.0], h)
    change = sum((w * rate for w, rate in zip(forward, rates)), torch.zeros_like(moved))

    def correct(x: Tensor, clean: Tensor) -> Tensor:
        """Of the latents there, which are the prediction unless somebody changed them."""
        better = sum((w * rate for w, rate in zip(back, [*rates, clean - seen[0]])), -change)
        return x + scale * better

    return moved + scale * change, correct


def _weights(ratios: list[float], h: float) -> list[float]:
    """The weights w of a UniPC step: for each n from 1, the sum of w r^(n-1) is n! phi_{n+1}(-h) (-h) / (e^-h - 1).

    A single one is 1/2, which its order allows, as authors and all programs have it.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, right = math.expm1(-h) / -h, []
    for n in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(n)) / -h
        right.append(math.factorial(n) * phi * -h / math.expm1(-h))
    matrix = torch.tensor([[r**n for r in ratios] for n in range(len(ratios))], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
