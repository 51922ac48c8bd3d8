"""The noise schedule by its formula and live against diffusers' scheduler; Euler and guidance by what they compute."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from reference import relative_error
from torch import Tensor

from samplers import (
    Ask,
    Evaluation,
    Guidance,
    Guiding,
    Moment,
    Point,
    Solver,
    Solving,
    Step,
    classifier_free_guidance,
    combined,
    drawing,
    euler,
    guided,
    shift_sigma,
    shifted_sigmas,
    solver,
    unguided,
)

ONE_ULP = 1.2e-7  # of float32, relative


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs(steps: int, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


# ---- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 28, 40, 50])
def test_schedule_is_the_written_out_formula(steps: int, shift: float) -> None:
    """Against Python's own arithmetic: even steps from 1 to the shifted 1/1000, each shifted, then 0."""
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)
    even = [1 + (last - 1) * i / max(steps - 1, 1) for i in range(steps)]
    expected = [shift * t / (1 + (shift - 1) * t) for t in even] + [0.0]
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(expected, rel=ONE_ULP, abs=0)


def test_schedule_has_the_published_numbers() -> None:
    """Against the numbers of SD3's published pipelines for 28 steps and shift 3, to the digits given."""
    sigmas = shifted_sigmas(28).tolist()
    assert len(sigmas) == 29
    assert [round(s, 5) for s in sigmas[:3]] == [1.0, 0.98738, 0.97411]
    assert [round(s, 5) for s in sigmas[-5:]] == [0.27805, 0.19983, 0.11091, 0.00893, 0.0]
    assert round(shifted_sigmas(40)[-2].item(), 7) == 0.0089286


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 28, 40, 50, 100, 999])
def test_schedule_is_that_of_diffusers(steps: int, shift: float) -> None:
    """Live against FlowMatchEulerDiscreteScheduler, which computes in float32."""
    sigmas, expected = shifted_sigmas(steps, shift), theirs(steps, shift).sigmas
    assert sigmas.shape == expected.shape
    assert sigmas.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-7)


@given(st.integers(1, 200), st.floats(0.1, 20))
def test_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    """For any length and shift; more shift means more noise everywhere between the ends."""
    sigmas = shifted_sigmas(steps, shift).tolist()
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, steps + 1)
    assert all(a > b for a, b in pairwise(sigmas))
    more = shifted_sigmas(steps, 1.5 * shift).tolist()
    assert all(a > b for a, b in zip(more[1:-1], sigmas[1:-1]))


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_has_its_inverse(sigma: float, shift: float) -> None:
    """Shifting by s and then by 1 / s is nothing, and so is shifting by 1."""
    t = torch.tensor(sigma, dtype=torch.float64)
    assert float(shift_sigma(shift_sigma(t, shift), 1 / shift)) == pytest.approx(sigma, rel=1e-12)
    assert float(shift_sigma(t, 1.0)) == sigma


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (28, 0.0), (28, -3.0), (28, math.nan)])
def test_schedule_refuses(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=r"steps is|shift is"):
        shifted_sigmas(steps, shift)


# ---- Euler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-1.5, 0.3, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_euler_on_a_linear_velocity(steps: int, rate: float) -> None:
    """For velocity = rate x, against the product of (1 + rate dsigma) in float64."""
    x, sigmas = noise(2, 3, 4), shifted_sigmas(steps)
    factor = math.prod(1 + rate * (after - before) for before, after in pairwise(sigmas.double().tolist()))
    assert relative_error(euler(lambda x, _: rate * x, x, sigmas), factor * x.double()) <= 1e-6


def test_euler_converges_to_the_exact_flow() -> None:
    """For velocity = x, against x / e; twice the steps halve the error, as of a method of first order."""
    x = noise(8).double()
    errors = [
        relative_error(euler(lambda x, _: x, x, torch.linspace(1, 0, steps + 1).double()), x / math.e)
        for steps in (100, 200, 400)
    ]
    assert errors[0] < 0.01
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2, 2], rel=0.02)


def test_euler_is_exact_on_straight_lines() -> None:
    """A velocity of noise - picture leads from the noise to the picture, exactly, in any number of steps."""
    start, picture = torch.tensor([3.0, -8.0, 0.5]), torch.tensor([1.0, 4.0, 0.25])
    for sigmas in ([1.0, 0.0], [1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.875, 0.125, 0.0]):
        assert torch.equal(euler(lambda *_: start - picture, start, torch.tensor(sigmas)), picture)


@pytest.mark.parametrize("steps", [1, 7, 28])
def test_euler_is_the_step_of_diffusers(steps: int) -> None:
    """On random velocities live against scheduler.step: bit for bit on its sigmas, else up to their rounding."""
    scheduler, velocities = theirs(steps), noise(steps, 2, 16, 8, 12)
    x = start = noise(2, 16, 8, 12, seed=1)
    for timestep, velocity in zip(scheduler.timesteps, velocities):
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    for sigmas, bound in ((scheduler.sigmas, 0.0), (shifted_sigmas(steps), 1e-6)):
        left = iter(velocities)
        assert relative_error(euler(lambda *_, left=left: next(left), start, sigmas), x) <= bound


def test_euler_calls_back_after_every_step() -> None:
    """One evaluation and then one call a step, with what the step saw and made; the start is left as it was."""
    order: list[str] = []
    steps: list[Step] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        order.append(f"velocity {float(sigma)}")
        assert sigma.ndim == 0
        return x + sigma

    def callback(step: Step) -> None:
        order.append(f"callback {step.index}")
        steps.append(step)

    start, sigmas = noise(2, 3), torch.tensor([1.0, 0.75, 0.5, 0.0])
    kept = start.clone()
    end = euler(velocity, start, sigmas, callback)
    assert order == [
        "velocity 1.0", "callback 0", "velocity 0.75", "callback 1", "velocity 0.5", "callback 2",
    ]  # fmt: skip
    assert torch.equal(start, kept)
    before = start
    for i, step in enumerate(steps):
        assert (step.index, float(step.sigma)) == (i, float(sigmas[i]))
        assert torch.equal(step.velocity, before + sigmas[i])
        assert torch.equal(step.x, before + (sigmas[i + 1] - sigmas[i]) * step.velocity)
        before = step.x
    assert torch.equal(end, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_euler_ends_where_the_callback_raises(error: type[BaseException]) -> None:
    """After the third step nothing more is evaluated, and the error arrives as it was."""
    calls: list[Tensor] = []

    def callback(step: Step) -> None:
        if step.index == 2:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        euler(lambda x, sigma: calls.append(sigma) or x, noise(3), shifted_sigmas(28), callback)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_euler_keeps_float32(dtype: torch.dtype) -> None:
    """Latents stay float32 whatever the velocity's number format."""
    seen: list[torch.dtype] = []
    end = euler(lambda x, _: x.to(dtype), noise(4), shifted_sigmas(3), lambda step: seen.append(step.x.dtype))
    assert {end.dtype, *seen} == {torch.float32}


# ---- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5, -2.0])
def test_guidance_is_one_evaluation_of_both_texts(scale: float) -> None:
    """At the point itself, the prompt first; against uncond + scale (cond - uncond) written out."""
    x, cond, uncond = noise(3, 4, 5), noise(3, 4, 5, seed=1), noise(3, 4, 5, seed=2)
    calls: list[Evaluation] = []

    def predict(*asked: Any) -> tuple[Tensor, Tensor]:
        calls.append(Evaluation(*asked))
        return cond, uncond

    found = guided(predict, combined(classifier_free_guidance(scale)))(x, torch.tensor(0.7))
    ((at, asks),) = calls
    assert at.x is x
    assert float(at.sigma) == pytest.approx(0.7)
    assert asks == (Ask("prompt"), Ask("negative"))
    expected = (1 - scale) * uncond.double() + scale * cond.double()
    assert relative_error(found, expected) <= 1e-6
    if scale == 0:
        assert torch.equal(found, uncond)


def test_guidance_inside_euler() -> None:
    """28 steps are 28 evaluations; with velocity +-x the guided flow is that of (2 scale - 1) x."""
    asked: list[tuple[str, ...]] = []

    def predict(at: Moment, asks: tuple[Ask, ...]) -> list[Tensor]:
        asked.append(tuple(ask.text for ask in asks))
        return [at.x if ask.text == "prompt" else -at.x for ask in asks]

    x, sigmas = noise(2, 3), shifted_sigmas(28)
    end = euler(guided(predict, combined(classifier_free_guidance(4.5))), x, sigmas)
    assert asked == [("prompt", "negative")] * 28
    assert relative_error(end, euler(lambda x, _: 8.0 * x, x, sigmas)) <= 1e-5


@pytest.mark.parametrize(
    ("interval", "inside"),
    [((0.0, 1.0), [1, 1, 1, 1]), ((0.2, 0.75), [0, 1, 1, 0]), ((0.5, 0.5), [0, 0, 1, 0]), ((0.8, 0.9), [0, 0, 0, 0])],
)
def test_guidance_in_an_interval(interval: tuple[float, float], inside: list[int]) -> None:
    """Outside it the prompt alone is evaluated; bounds belong to it. cond 3 x, uncond x: guided (1 + 2 scale) x."""
    asked: list[tuple[str, ...]] = []

    def predict(at: Moment, asks: tuple[Ask, ...]) -> list[Tensor]:
        asked.append(tuple(ask.text for ask in asks))
        return [3 * at.x if ask.text == "prompt" else at.x for ask in asks]

    x, found = torch.tensor([[1.0], [-2.0]]), guided(predict, combined(classifier_free_guidance(4.0, interval)))
    for sigma, is_inside in zip((1.0, 0.75, 0.5, 0.1), inside):
        assert torch.equal(found(x, torch.tensor(sigma)), (9 if is_inside else 3) * x)
    assert asked == [("prompt", "negative") if is_inside else ("prompt",) for is_inside in inside]


# ---- the contract --------------------------------------------------------------------------------


@solver(levels=lambda sigmas: torch.stack([sigmas[:-1], (sigmas[:-1] + sigmas[1:]) / 2], dim=1).flatten())
def midpoint(x: Tensor, sigmas: Tensor) -> Solving:
    """A solver that needs the velocity between the steps too."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        first = yield Point(x, sigma)
        half = (sigma + sigma_next) / 2
        second = yield Point(x + (half - sigma) * first, half)
        x = yield Step(i, sigma, first, x, x + (sigma_next - sigma) * second)
    return x


def three_texts(at: Moment) -> Guiding:
    """A guidance of three evaluations, the last at another point, which depends on the first."""
    a, b = yield Evaluation(at, (Ask("prompt"), Ask("negative")))
    (c,) = yield Evaluation(at._replace(x=at.x + a), (Ask("prompt"),))
    return a - b + c


@pytest.mark.parametrize("way", [euler, midpoint])
@pytest.mark.parametrize("guidance", [unguided, combined(classifier_free_guidance(3.0, (0.3, 0.8))), three_texts])
def test_asked_for_or_called_it_is_the_same(way: Solver, guidance: Guidance) -> None:
    """A picture's questions, answered one by one, against the solver called with a function; bit for bit."""
    x, sigmas = noise(1, 3, 2), shifted_sigmas(7)

    def predict(at: Moment, asks: tuple[Ask, ...]) -> list[Tensor]:
        return [(1.5 if ask.text == "prompt" else -0.5) * at.x.sin() * (1 + at.sigma) for ask in asks]

    steps: list[Step] = []
    expected = way(guided(predict, guidance), x, sigmas, steps.append)
    watched: list[Step] = []
    asking = drawing(way, guidance, x, sigmas, lambda step: watched.append(step) or step.x)
    asked, levels = next(asking), set()
    found = None
    while found is None:
        levels.add(float(asked.at.sigma))
        try:
            asked = asking.send(predict(*asked))
        except StopIteration as end:
            found = end.value
    assert torch.equal(found, expected)
    assert len(watched) == len(steps) == 7
    assert all(torch.equal(a, b) for one, other in zip(watched, steps) for a, b in zip(one[1:], other[1:]))
    assert levels == set(way.levels(sigmas).tolist())  # all that it asked for was told beforehand


def test_who_watches_may_change_the_latents() -> None:
    """What is given back after a step is what the next goes on with: x halved after each of two steps of +x."""
    asking = drawing(euler, unguided, torch.ones(1), torch.tensor([1.0, 0.5, 0.0]), lambda step: step.x / 2)
    asked = next(asking)
    assert float(asked.at.x) == 1
    asked = asking.send([asked.at.x])
    assert float(asked.at.x) == 0.25
    with pytest.raises(StopIteration) as end:
        asking.send([asked.at.x])
    assert float(end.value.value) == 0.0625


def test_the_clean_latents_that_a_step_predicts() -> None:
    """On a straight way, x = (1 - sigma) clean + sigma noise with velocity noise - clean, they are the clean ones."""
    clean, start = noise(2, 3), noise(2, 3, seed=1)
    found: list[Tensor] = []
    euler(lambda *_: start - clean, start, shifted_sigmas(5), lambda step: found.append(step.denoised))
    assert len(found) == 5
    assert all(relative_error(one, clean) <= 1e-5 for one in found)
