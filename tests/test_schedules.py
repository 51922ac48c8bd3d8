"""The noise schedules: by published numbers, by formulas written out, and live against mpmath and diffusers."""

import math

import mpmath
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from mmdit.common.errors import SettingsError
from samplers import SCHEDULES, scheduled, shift_for
from samplers.schedule import falls, incomplete_beta

ONE_ULP = 1.2e-7  # of float32, relative
SMALLEST = 3 * 0.001 / (1 + 2 * 0.001)  # trained level, shift 3


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def test_schedules_have_the_published_numbers() -> None:
    """What other programs give for shift 3: the last three of 28 steps, and the last of 40."""
    expected = {
        "sgm_uniform": ([0.27012, 0.19385, 0.1075], 0.07933),
        "simple": ([0.26645, 0.18881, 0.10075], 0.07143),
        "linear": ([0.26471, 0.1875, 0.1], 0.07143),
        "discrete": ([0.19565, 0.10595, 0.00299], 0.00299),
    }
    for name, (last, of_40) in expected.items():
        assert [round(s, 5) for s in SCHEDULES[name](28, 3.0).tolist()[-4:-1]] == last
        assert round(float(SCHEDULES[name](40, 3.0)[-2]), 5) == of_40


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_schedules_are_the_written_out_formulas(steps: int, shift: float) -> None:
    """Against Python's own arithmetic."""
    least, even = shifted(0.001, shift), [i / max(steps - 1, 1) for i in range(steps)]
    expected = {
        "sgm_uniform": [shifted(1 + (least - 1) * i / steps, shift) for i in range(steps)],
        "simple": [shifted((1000 - int(i * (1000 / steps))) / 1000, shift) for i in range(steps)],
        "karras": [(1 + (least ** (1 / 7) - 1) * part) ** 7 for part in even],
        "exponential": [math.exp(math.log(least) * part) for part in even],
        "linear": [shifted(1 - i / steps, shift) for i in range(steps)],
        "discrete": [shifted((999 * (1 - part) + 1) / 1000, shift) for part in even],
    }
    for name, levels in expected.items():
        sigmas = SCHEDULES[name](steps, shift)
        assert sigmas.dtype == torch.float32
        assert sigmas.tolist() == pytest.approx([*levels, 0.0], rel=2 * ONE_ULP, abs=0)


def test_spacings_as_diffusers() -> None:
    """Live against the functions that its scheduler takes for `use_karras_sigmas` and `use_exponential_sigmas`."""
    scheduler, ends = FlowMatchEulerDiscreteScheduler(), torch.tensor([1.0, SMALLEST], dtype=torch.float64)
    for name, theirs in (("karras", scheduler._convert_to_karras), ("exponential", scheduler._convert_to_exponential)):
        expected = [float(s) for s in theirs(in_sigmas=ends, num_inference_steps=28)]
        assert SCHEDULES[name](28, 3.0).tolist() == pytest.approx([*expected, 0.0], rel=1e-6)


@pytest.mark.parametrize("a", [0.6, 0.3, 1.0, 2.5])
def test_the_beta_distribution_is_that_of_mpmath(a: float) -> None:
    """At both ends too, to the rounding of float64."""
    x = [0.0, 1e-9, 0.0005, 0.1, 0.4999, 0.5, 0.5001, 0.77, 0.9995, 1.0]
    expected = [float(mpmath.betainc(a, a, 0, at, regularized=True)) for at in x]
    assert incomplete_beta(torch.tensor(x, dtype=torch.float64), a).tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 1.0), (9, 3.0), (28, 3.0)])
def test_beta_is_the_inverse_rounded_to_an_entry(steps: int, shift: float) -> None:
    """By mpmath's search for each quantile: the entry nearest to 999 times it, of the 1000 trained levels."""
    expected = []
    for i in range(steps):
        quantile = 1 - mpmath.mpf(i) / steps
        root = 1.0 if i == 0 else mpmath.findroot(
            lambda x, quantile=quantile: mpmath.betainc(0.6, 0.6, 0, x, regularized=True) - quantile,
            (0, 1), solver="anderson", tol=1e-12,
        )  # fmt: skip
        expected.append(shifted((round(float(root) * 999) + 1) / 1000, shift))
    assert SCHEDULES["beta"](steps, shift).tolist() == pytest.approx([*expected, 0.0], rel=ONE_ULP)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 130), st.floats(0.1, 20))
def test_every_schedule_falls_from_one_to_zero(name: str, steps: int, shift: float) -> None:
    sigmas = SCHEDULES[name](steps, shift)
    assert (float(sigmas[0]), float(sigmas[-1]), len(sigmas)) == (1.0, 0.0, steps + 1)
    assert falls(sigmas)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_refuses(name: str) -> None:
    for steps, shift in ((0, 3.0), (28, 0.0), (28, math.nan)):
        with pytest.raises(ValueError, match=r"steps is|shift is"):
            SCHEDULES[name](steps, shift)


@pytest.mark.parametrize(("name", "most"), [("beta", 138), ("simple", 1000)])
def test_no_more_levels_than_there_are(name: str, most: int) -> None:
    """More is refused, with how many there are; so many are given, and one more is too many indeed."""
    assert falls(scheduled(name, most, 3.0))
    assert not falls(SCHEDULES[name](most + 1, 3.0))
    for steps in (most + 1, 100_000):
        with pytest.raises(
            SettingsError, match=rf"schedule {name} has no {steps} levels that differ, but {most} \(shift 3\)"
        ):
            scheduled(name, steps, 3.0)
    with pytest.raises(SettingsError, match=r"schedule normal has no 50000 levels that differ, but \d+ \(shift 1000\)"):
        scheduled("normal", 50_000, 1000.0)


def test_the_shift_of_other_sizes() -> None:
    """The SD3 paper's rule, sqrt(m / n): twice the side is twice the shift, the same area the same."""
    assert shift_for(3.0, 2048 * 2048, 1024 * 1024) == 6.0
    assert shift_for(3.0, 512 * 2048, 1024 * 1024) == 3.0
    assert shift_for(3.0, 512 * 1024, 1024 * 1024) == pytest.approx(3 * 0.5**0.5)
