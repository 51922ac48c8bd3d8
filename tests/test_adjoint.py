"""Adjoint matching on toys: steps of the stochastic equation, the adjoint, and the loss, all solved by hand."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from reference import relative_error
from torch import Tensor

from mmdit.finetune.adjoint import Seen, Step, adjoints, drawn, mismatch, steps_of
from samplers import shifted_sigmas

# ---- the stochastic equation -----------------------------------------------------------------------


def deviations(steps: list[Step], spread: float = 0.775) -> list[float]:
    """After each step, of the exact deviation, for data from a Gaussian of this one."""
    x, found = 1.0, []
    for step in steps:
        t, after = 1 - step.sigma, 1 - step.sigma + step.height
        slope = (t * spread**2 - (1 - t)) / (t**2 * spread**2 + (1 - t) ** 2)  # of the velocity in X
        x = math.hypot((step.keep + step.gain * slope) * x, step.noise)
        found.append(x / math.hypot(after * spread, 1 - after))
    return found


def test_steps_keep_the_deviation_of_a_gaussian() -> None:
    """The figures of `steps_of`, and bounds for other numbers of steps and narrower data."""
    found = deviations(steps_of(shifted_sigmas(28, 3.0).tolist()))
    told = [found[0], found[1], found[-1], max(found), min(found)]
    assert [round(x, 2) for x in told] == [1.0, 1.0, 0.98, 1.02, 0.98]
    for count, most in {10: 0.08, 20: 0.03, 28: 0.02, 50: 0.011}.items():
        found = deviations(steps_of(shifted_sigmas(count, 3.0).tolist()))
        assert 1 - most < min(found) <= max(found) < 1 + most
    found = deviations(steps_of(shifted_sigmas(50, 3.0).tolist()), 0.3)
    assert 0.95 < min(found) <= max(found) < 1.05
    released = []
    for above, below in pairwise(shifted_sigmas(28, 3.0).tolist()):
        t, h, e = 1 - above, above - below, 1e-3
        s = math.sqrt(2 * (1 - t + e) / (t + e))
        released.append(Step(above, h, 1 - h * (1 + e) / (t + e), 2 * h, math.sqrt(h) * s))
    assert [round(x, 2) for x in deviations(released)[:2]] == [12.86, 1.42]


def test_trajectories_are_drawn_so() -> None:
    """20000 of them have the deviation of the formula."""
    steps, generator = steps_of(shifted_sigmas(8, 3.0).tolist()), torch.Generator().manual_seed(0)

    def see(k: int, x: Tensor) -> Seen:
        t = 1 - steps[k].sigma
        slope = (t * 0.6 - (1 - t)) / (t**2 * 0.6 + (1 - t) ** 2)
        return Seen(slope * x, x[:, 0], x)

    way = drawn(
        steps, torch.randn(20000, 1, generator=generator), see, lambda: torch.randn(20000, 1, generator=generator)
    )
    exact = [math.hypot((1 - s.sigma) * 0.6**0.5, s.sigma) for s in steps[1:]]
    expected = [x * y for x, y in zip(deviations(steps, 0.6**0.5), exact)]
    for points, deviation in zip(way.points[1:], expected):
        assert float(points.std()) == pytest.approx(deviation, rel=0.02)


# ---- the adjoint -----------------------------------------------------------------------------------

STEPS = steps_of(shifted_sigmas(6, 3.0).tolist())


def test_the_adjoint_is_the_gradient_of_the_steps_that_are_taken() -> None:
    """Against autograd through all of them, of a velocity and a cost that are not linear, in float64."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices, noises = random(len(STEPS), 4, 4), iter(random(len(STEPS), 3, 4))

    def velocity(k: int, x: Tensor) -> Tensor:
        return (x @ matrices[k]).sin() + 0.3 * x

    def cost(k: int, x: Tensor) -> Tensor:
        return (x @ matrices[k].T).cos().sum(1) + (k + 1) * x.square().sum(1)

    start, whole, total = random(3, 4), list[Tensor](), torch.zeros((), dtype=torch.float64)
    x = start.clone().requires_grad_()
    for k, (step, xi) in enumerate(zip(STEPS, kept := list(noises))):
        whole.append(x)
        total = total + 7 * step.height * cost(k, x).sum()
        x = step.keep * x + step.gain * velocity(k, x) + step.noise * xi
    expected = torch.autograd.grad(total, whole)

    def see(k: int, x: Tensor) -> Seen:
        leaf = x.clone().requires_grad_()
        costs = cost(k, leaf)
        return Seen(velocity(k, x), costs.detach(), torch.autograd.grad(costs.sum(), leaf)[0])

    def pull(k: int, x: Tensor, a: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(velocity(k, leaf), leaf, a)[0]

    draws = iter(kept)
    way = drawn(STEPS, start, see, lambda: next(draws))
    found = adjoints(STEPS, way, pull, scale=7)
    assert len(found) == len(STEPS) - 1
    for one, other in zip(found, expected[1:]):
        assert relative_error(one, other) < 1e-12


def test_the_loss_is_the_control_beside_the_adjoint() -> None:
    """Numbers by hand; 0, and so is its gradient, where the control is minus s times the adjoint."""
    step = STEPS[-2]
    t, h = 1 - step.sigma, step.height
    s = math.sqrt(2 * (1 - t) / (t + h))
    assert (step.control, step.spread) == (pytest.approx(2 / s), pytest.approx(s))
    base, adjoint = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.4])
    loss = mismatch(step, torch.tensor([0.6, -1.0]), base, adjoint)
    assert loss.tolist() == pytest.approx([(2 / s * 0.1 + s * 0.2) ** 2, (s * 0.4) ** 2])
    best = (base - s**2 / 2 * adjoint).requires_grad_()
    mismatch(step, best, base, adjoint).sum().backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-6


def test_what_the_loss_is_least_for_is_the_best_control() -> None:
    """A linear flow with a quadratic cost, whose best control Riccati's equation gives, step by step backwards.

    There the loss has no slope in the feedback of any step; of the flow as it was it has.
    """
    slope, weight, count = -0.4, 30.0, 20000
    best, least = [0.0] * len(STEPS), 0.0  # v = slope x - best[k] x; least x^2 / 2 is the cost to come
    for k in range(len(STEPS) - 1, -1, -1):
        step = STEPS[k]
        drift, power = step.keep + step.gain * slope, step.noise**2
        best[k] = power * least * drift / (1 + power * least) / step.gain
        least = drift**2 * least / (1 + power * least) + weight * step.height

    def slopes(feedback: list[float]) -> list[float]:
        """Of the loss in each step's feedback, in its own deviations."""
        generator = torch.Generator().manual_seed(1)

        def see(k: int, x: Tensor) -> Seen:
            return Seen((slope - feedback[k]) * x, x[:, 0], x)

        random = partial(torch.randn, count, 1, generator=generator, dtype=torch.float64)
        way = drawn(STEPS, random(), see, random)
        found = []
        for k, a in enumerate(adjoints(STEPS, way, lambda *given: slope * given[2], weight)):
            x, own = way.points[k], torch.zeros(count, 1, dtype=torch.float64, requires_grad=True)
            mismatch(STEPS[k], (slope - feedback[k] - own) * x, slope * x, a).sum().backward()
            assert own.grad is not None
            found.append(float(own.grad.mean() / own.grad.std() * math.sqrt(count)))
        return found

    assert max(map(abs, slopes(best))) < 4
    assert min(map(abs, slopes([0.0] * len(STEPS))[1:])) > 30  # in the first the cost hardly follows
