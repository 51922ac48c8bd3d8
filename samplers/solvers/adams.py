"""Multistep solvers that integrate the polynomial through the last velocities: Adams and Bashforth's methods."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from torch import Tensor

from samplers.flow import Point, Solving, Step, solver

Time = Callable[[np.ndarray], np.ndarray]  # of noise levels: in what the velocity is taken for a polynomial


@solver()
def lms(x: Tensor, sigmas: Tensor) -> Solving:
    """The linear multistep method of fourth order, its polynomial in sigma; one evaluation a step.

    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section III.5: Adams methods for steps of any
    size. The order rises with the steps done; a step to 0 is Euler's. ComfyUI and k-diffusion `sample_lms`, whose
    integrals are approximate.
    """
    return (yield from _multistep(x, sigmas, order=4, time=lambda sigma: sigma, nodes=2))


@solver()
def deis(x: Tensor, sigmas: Tensor) -> Solving:
    """DEIS (tAB) of third order: the velocity's polynomial is one in the time of a process that keeps its variance.

    Zhang & Chen 2022 (arXiv 2204.13902), equations 14 and 15, with the time sqrt(log(1 + sigma²)): that of a noise rate
    which rises evenly from 0. One evaluation a step, the first and one to 0 are Euler's. ComfyUI `sample_deis` ("tab"),
    whose rate begins near 0 and whose integrals are sums; diffusers' `DEISMultistepScheduler` takes log sigma for time.
    """
    return (yield from _multistep(x, sigmas, order=3, time=lambda sigma: np.sqrt(np.log1p(sigma**2)), nodes=16))


def _multistep(x: Tensor, sigmas: Tensor, order: int, time: Time, nodes: int) -> Solving:
    """The way from `sigmas[0]` to `sigmas[-1]`, by the last `order` velocities, or as many as there are."""
    levels, seen = sigmas.tolist(), list[Tensor]()  # the newest first
    for i, (now, after) in enumerate(pairwise(levels)):
        velocity = yield Point(x, sigmas[i])
        seen = [velocity, *seen[: order - 1]]
        known = [levels[i - j] for j in range(len(seen))] if after > 0 else [now]
        moved = x
        for weight, one in zip(weights(known, after, time, nodes), seen):
            moved = moved + weight * one
        x = yield Step(i, sigmas[i], velocity, x, moved)
    return x


def weights(known: list[float], after: float, time: Time, nodes: int) -> list[float]:
    """What each velocity counts in a step from `known[0]` to `after`: the integral of its Lagrange polynomial.

    known: the levels of the velocities. nodes: of Gauss and Legendre's rule; n are exact up to the degree 2 n - 1.
    """
    places, sizes = np.polynomial.legendre.leggauss(nodes)
    half = (after - known[0]) / 2
    at, t = time(known[0] + half * (1 + places)), time(np.array(known))
    others = [np.delete(t, j) for j in range(len(t))]
    polynomials = [np.prod((at[:, None] - other) / (t[j] - other), axis=1) for j, other in enumerate(others)]
    return [float(half * sizes @ polynomial) for polynomial in polynomials]
