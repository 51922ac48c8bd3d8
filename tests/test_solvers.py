"""Every solver: on flows whose solution is known, live against diffusers where it computes the same, and by formula."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from reference import relative_error
from torch import Tensor

from samplers import SCHEDULES, SOLVERS, Source, Step, euler, shift_sigma, shifted_sigmas
from samplers.options import SAMPLERS, SPACINGS
from samplers.solvers.adams import weights
from samplers.solvers.onestep import euler_ancestral
from samplers.solvers.stochastic import dpmpp_2m_sde, dpmpp_3m_sde

STOCHASTIC = {"dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": dpmpp_3m_sde, "euler_ancestral": euler_ancestral}
SETTLED = {name: STOCHASTIC[name](0.0) if name in STOCHASTIC else way for name, way in SOLVERS.items()}  # without noise


def test_every_name_has_its_function() -> None:
    """The names in options, which load no PyTorch, are those of the registries."""
    assert [*SAMPLERS] == [*SOLVERS]
    assert [*SPACINGS] == [*SCHEDULES]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(seed: int) -> Source:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


# ---- flows whose solution is known -----------------------------------------------------------------

MEAN, SPREAD = 1.5, 0.6  # of Gaussian data


def mean(sigma: float) -> float:
    return (1 - sigma) * MEAN


def spread(sigma: float) -> float:
    return math.hypot((1 - sigma) * SPREAD, sigma)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact velocity for such data: E[noise - clean | x], both Gaussian with x."""
    s = float(sigma)
    pull = (x - mean(s)) / spread(s) ** 2
    return s * pull - (MEAN + (1 - s) * SPREAD**2 * pull)


def warmed(steps: int) -> Tensor:
    """Even levels, but for a few very small steps at both ends, so that a lower order there does not count."""
    begin, end, small = 0.95, 0.3, 2e-5
    middle = torch.linspace(begin - 4 * small, end + 4 * small, steps + 1, dtype=torch.float64).tolist()
    levels = [*(begin - i * small for i in range(4)), *middle, *(end + i * small for i in (3, 2, 1, 0))]
    return torch.tensor(levels, dtype=torch.float64)


ORDERS = {
    "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "euler_ancestral": 1, "unipc": 4, "deis": 3, "lms": 4,
    "res_multistep": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    """On the flow of Gaussian data, with the exact end: halving the steps divides the error by 2 to the order.

    UniPC's predictor is of third order, its corrector adds one. The 3M form is of second order at last, which shows
    at no number of steps that could be taken; its formula is tested below.
    """
    z = torch.linspace(-2, 2, 7, dtype=torch.float64)
    errors = []
    for steps in (32, 64, 128):
        sigmas = warmed(steps)
        start, end = (mean(s) + spread(s) * z for s in (float(sigmas[0]), float(sigmas[-1])))
        errors.append(relative_error(SETTLED[name](gaussian, start, sigmas), end))
    assert errors[0] < 0.02
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    if name == "unipc":
        assert found[0] > 3.7
    else:
        assert found[-1] == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("schedule", ["normal", "linear", "beta"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_picture_that_is_known_is_drawn(name: str, schedule: str) -> None:
    """Where all velocities point to one picture, it is drawn, whatever noise is put in; from any number of steps."""
    picture = noise(2, 5, seed=3)
    for steps in (1, 2, 3, 8):
        sigmas = SCHEDULES[schedule](steps, 3.0).double()
        end = SOLVERS[name](lambda x, sigma: (x - picture) / sigma, noise(2, 5), sigmas, noise=source(1))
        assert relative_error(end, picture) <= 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_what_it_asks_was_told(name: str) -> None:
    """The levels that it announces are all that it asks for, and the steps have its numbers, from any levels."""
    for levels in ([1.0, 0.0], [1.0, 0.9, 0.5, 0.2, 0.1, 0.01, 0.0], [0.8, 0.4, 0.0], [1.0, 0.99999, 0.5, 0.3]):
        sigmas, asked, steps = torch.tensor(levels), set[float](), list[Step]()

        def velocity(x: Tensor, sigma: Tensor, asked: set[float] = asked) -> Tensor:
            asked.add(float(sigma))
            assert sigma.ndim == 0 and 0 < sigma <= 1
            return x.sin().to(torch.bfloat16)

        end = SOLVERS[name](velocity, noise(3).float(), sigmas, steps.append)
        assert asked == set(SOLVERS[name].levels(sigmas).tolist())
        assert [step.index for step in steps] == list(range(len(levels) - 1))
        assert {step.x.dtype for step in steps} == {end.dtype} == {torch.float32}  # whatever the velocity's
        assert torch.isfinite(end).all()
        assert end is steps[-1].x


@pytest.mark.parametrize("name", SOLVERS)
def test_it_goes_on_from_what_it_is_sent(name: str) -> None:
    """Latents that somebody changed after a step are those of the next point, but for UniPC's correction of them."""
    sigmas, seen = torch.tensor([0.9, 0.6, 0.3, 0.0]), []
    way = SOLVERS[name].steps(torch.zeros(2), sigmas)
    told = next(way)
    try:
        while True:
            if isinstance(told, Step):
                told = way.send(told.x + 100)
                seen.append(float(told.x[0]))
            else:
                told = way.send(torch.zeros(2))
    except StopIteration as end:
        seen.append(float(end.value[0]))
    assert len(seen) == 3
    assert all(value > 99 * (i + 1) * 0.5 for i, value in enumerate(seen))
    assert seen[0] == pytest.approx(100, abs=5)


# ---- diffusers -------------------------------------------------------------------------------------


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    return (2 * x).sin() + x * sigma.to(x) ** 2 - 1


def theirs(scheduler: SchedulerMixin, x: Tensor, sigmas: Tensor, in_flow: bool, **more: Any) -> Tensor:
    """diffusers' way along these levels. in_flow: its latents are ours, else they are ours over sqrt(1 + sigma²)."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.arange(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    scale = torch.ones_like(sigmas) if in_flow else (1 + sigmas**2).sqrt()
    x = x / scale[0]
    for i, sigma in enumerate(sigmas[:-1]):
        given = {name: make(x) for name, make in more.items()}
        x = scheduler.step(curved(x * scale[i], sigma), i, x, return_dict=False, **given)[0]
    return x * scale[-1]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_to_zero_ends_at_the_clean_latents(name: str) -> None:
    """Those that the last velocity points to, whatever came before."""
    steps = list[Step]()
    end = SOLVERS[name](curved, noise(2, 3), SCHEDULES["linear"](7, 3.0).double(), steps.append, source(2))
    assert relative_error(end, steps[-1].denoised) <= 1e-12


STEPS = [1, 2, 3, 4, 9, 20]


@pytest.mark.parametrize("steps", STEPS)
def test_heun_is_that_of_diffusers(steps: int) -> None:
    """Live against FlowMatchHeunDiscreteScheduler on its own levels, which asks twice a step and once for the last."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])  # each is there twice
    x = start = noise(2, 16, 3).float()
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(curved(x, scheduler.sigmas[i]), timestep, x, return_dict=False)[0]
    assert len(scheduler.timesteps) == 2 * steps - 1
    assert relative_error(SOLVERS["heun"](curved, start, sigmas), x) <= 1e-5


VE: dict[str, Callable[[], SchedulerMixin]] = {
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint"),
    "res_multistep": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="heun"),
    "unipc": lambda: UniPCMultistepScheduler(solver_order=3, solver_type="bh2"),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", VE)
def test_in_log_sigma_as_diffusers(name: str, steps: int) -> None:
    """Live against its schedulers for noise that is added to clean latents, with the velocity for that noise."""
    x, sigmas = noise(2, 16, 3), SCHEDULES["sgm_uniform"](steps, 3.0).double()
    found = SOLVERS[name](curved, x, sigmas)
    assert relative_error(found, theirs(VE[name](), x, sigmas, in_flow=False)) <= 1e-5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_half_log_snr_as_diffusers(eta: float, steps: int) -> None:
    """Live against DPMSolverMultistepScheduler with flow sigmas, with the same noise, from below 1."""
    algorithm = "sde-dpmsolver++" if eta else "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_type="midpoint", use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    x, sigmas = noise(2, 16, 3), 0.98 * SCHEDULES["sgm_uniform"](steps, 3.0).double()
    more = {"variance_noise": source(5)} if eta else {}
    expected = theirs(scheduler, x, sigmas, in_flow=True, **more)
    assert relative_error(dpmpp_2m_sde(eta)(curved, x, sigmas, noise=source(5)), expected) <= 1e-5


# ---- formulas written out --------------------------------------------------------------------------

TIMES = {
    "lms": (4, lambda sigma: sigma, 2),
    "deis": (3, lambda sigma: np.sqrt(np.log1p(sigma**2)), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("levels", [[1.0, 0.98, 0.93, 0.7, 0.2], [0.3, 0.2, 0.11, 0.1, 0.009]])
def test_weights_are_integrals_of_lagrange_polynomials(name: str, levels: list[float]) -> None:
    """Against mpmath's quadrature of each polynomial in the method's time; and their use in a run."""
    order, time, nodes = TIMES[name]
    *known, after = levels[-order - 1 :]
    known.reverse()

    def exact(s: Any) -> Any:
        return s if name == "lms" else mpmath.sqrt(mpmath.log(1 + s**2))

    def polynomial(j: int) -> Callable[[Any], Any]:
        others = [exact(mpmath.mpf(s)) for k, s in enumerate(known) if k != j]
        return lambda s: math.prod((exact(s) - t) / (exact(mpmath.mpf(known[j])) - t) for t in others)

    expected = [float(mpmath.quad(polynomial(j), [known[0], after])) for j in range(order)]
    assert weights(known, after, time, nodes) == pytest.approx(expected, rel=1e-9)
    velocities, seen = iter(range(10)), list[Step]()
    SOLVERS[name](
        lambda x, _: torch.full_like(x, next(velocities)), torch.zeros(1).double(), torch.tensor(levels), seen.append
    )
    last = len(levels) - 2
    moved = sum(w * (last - j) for j, w in enumerate(expected))
    assert float(seen[-1].x - seen[-1].before) == pytest.approx(moved, rel=1e-5)


def test_deis_has_the_time_of_a_process_that_keeps_its_variance() -> None:
    """Up to a factor, which polynomials do not notice: t of sigma² + 1 = exp(b t² / 2), where the rate is b t."""
    rate = 2 * math.log(1 + 80**2)
    t = np.linspace(0.01, 0.3, 7)
    sigma = np.sqrt(np.expm1(rate * t**2 / 2))
    assert TIMES["deis"][1](sigma) == pytest.approx(t * math.sqrt(rate / 2), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_3m_is_the_integral_of_its_parabola(eta: float) -> None:
    """By mpmath: D as it is, its slope, and half of what the parabola through three values bends; and then noise."""
    levels, clean, fresh = [0.9, 0.7, 0.45, 0.3], [1.0, 0.4, -0.8], 0.7
    given = iter(clean)
    steps = list[Step]()
    dpmpp_3m_sde(eta)(
        lambda x, sigma: (x - next(given)) / sigma, torch.ones(1).double(), torch.tensor(levels).double(), steps.append,
        lambda like: torch.full_like(like, fresh),
    )  # fmt: skip
    a, b, c, d = (math.log((1 - s) / s) for s in torch.tensor(levels).double().tolist())
    bend, slope, _ = np.polyfit([a - c, b - c, 0.0], clean, 2)
    h = d - c

    def gained(s: Any) -> Any:
        return (1 + eta) * mpmath.exp(-(1 + eta) * (h - s)) * (clean[-1] + slope * s + bend / 2 * s**2)

    before, now, after = float(steps[-1].before), *torch.tensor(levels).double().tolist()[-2:]
    expected = after / now * math.exp(-eta * h) * before + (1 - after) * float(mpmath.quad(gained, [0, h]))
    expected += after * math.sqrt(1 - math.exp(-2 * eta * h)) * fresh
    assert float(steps[-1].x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_keeps_the_shares(eta: float) -> None:
    """After a step clean latents have the share 1 - sigma, old noise and new together the variance sigma²."""
    now, after = 0.8, 0.5
    down = after * (1 + (after / now - 1) * eta)

    def stepped(clean: float, old: float, fresh: float) -> float:
        sigmas, x = torch.tensor([now, after]).double(), torch.tensor([(1 - now) * clean + now * old]).double()
        velocity = torch.tensor([old - clean]).double()
        return float(
            euler_ancestral(eta)(lambda *_: velocity, x, sigmas, noise=lambda like: torch.full_like(like, fresh))
        )

    assert stepped(1, 0, 0) == pytest.approx(1 - after, rel=1e-6)
    kept, new = stepped(0, 1, 0), stepped(0, 0, 1)
    assert kept == pytest.approx(down * (1 - after) / (1 - down), rel=1e-6)
    assert math.hypot(kept, new) == pytest.approx(after, rel=1e-6)


# ---- with noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_leaves_the_distribution(name: str) -> None:
    """40000 samples of Gaussian data have its mean and spread, and little to do with the noise they began with."""
    steps = 160 if name == "euler_ancestral" else 40  # it is of first order
    start, sigmas = noise(40_000), SCHEDULES["karras"](steps, 3.0).double()
    end = SOLVERS[name](gaussian, start, sigmas, noise=source(7))
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(end.std()) == pytest.approx(SPREAD, rel=0.03)
    related = float(torch.corrcoef(torch.stack([start, end]))[0, 1])
    assert abs(related) < 0.5 < float(torch.corrcoef(torch.stack([start, euler(gaussian, start, sigmas)]))[0, 1])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_equal_seeds_equal_pictures(name: str) -> None:
    start, sigmas = noise(2, 3).float(), shifted_sigmas(6)
    one, same, other = (SOLVERS[name](curved, start, sigmas, noise=source(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert relative_error(one, other) > 0.1


@pytest.mark.parametrize("name", STOCHASTIC)
def test_without_noise_none_is_asked_for(name: str) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("asked for noise")

    x, sigmas = noise(4), shifted_sigmas(12).double()
    end = STOCHASTIC[name](0.0)(curved, x, sigmas, noise=refuse)
    if name == "euler_ancestral":
        assert relative_error(end, euler(curved, x, sigmas)) <= 1e-12


def test_the_first_level_below_one() -> None:
    """That at which ComfyUI asks with the shift 3, at 1/10000 of the way; halfway to the next where that is nearer."""
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    almost = float(shift_sigma(torch.tensor(0.9999, dtype=torch.float64), 3.0))
    assert SOLVERS["dpmpp_2m_sde"].levels(sigmas).tolist() == pytest.approx([almost, 0.5], rel=1e-7)
    assert float(SOLVERS["dpmpp_3m_sde"].levels(torch.tensor([1.0, 0.99998, 0.0]))[0]) == pytest.approx(0.99999)
    assert SOLVERS["dpmpp_2m_sde"].levels(torch.tensor([0.9, 0.0])).tolist() == pytest.approx([0.9])
