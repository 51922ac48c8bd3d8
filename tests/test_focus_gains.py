"""How hard subjects are pushed apart over the steps, and what a user may say of it."""

import itertools
from typing import Any

import pytest
import torch

from mmdit.common.errors import SettingsError
from mmdit.common.options import check_options, rooms
from mmdit.driver.options import FocusOptions
from samplers import shifted_sigmas
from samplers.focus import COSTS, GAINS, Push, options


def walked(steps: int) -> list[Push]:
    """A push at each step of SD3's published levels, of a velocity of length 6 and a gradient of length 0.5."""
    sigmas = shifted_sigmas(steps, 3.0).double().tolist()
    velocity, gradient = torch.full((1, 4, 3, 3), 1.0), torch.full((1, 4, 3, 3), 0.5 / 6)
    return [Push(a, a - b, velocity, gradient) for a, b in itertools.pairwise(sigmas)]


def sums(name: str, steps: int) -> float:
    return sum(at.height * float(GAINS[name](at)) for at in walked(steps))


def test_the_released_gain_over_28_steps() -> None:
    """The numbers that were read off the authors' program on diffusers' levels."""
    at = walked(28)
    told = {0: (2002, 25.26), 1: (143.3, 1.90), 2: (70.6, 0.99), 3: (45.2, 0.67), 5: (24.3, 0.40), 7: (15.3, 0.28),
            13: (4.96, 0.14), 20: (1.09, 0.055), 27: (0, 0)}  # fmt: skip
    for step, (gain, pushed) in told.items():
        assert GAINS["code"](at[step]) == pytest.approx(gain, rel=4e-3, abs=1e-3)
        assert at[step].height * float(GAINS["code"](at[step])) == pytest.approx(pushed, rel=0.02, abs=5e-3)
    assert [round(sums("code", steps), 1) for steps in (20, 28, 40, 50)] == [42.7, 32.2, 24.9, 21.6]
    assert at[0].height * float(GAINS["code"](at[0])) / sums("code", 28) == pytest.approx(0.78, abs=0.006)


def test_the_other_gains() -> None:
    """How much each pushes in all, over 20 to 50 steps."""
    for steps in (20, 28, 40, 50):
        assert sums("memoryless", steps) == pytest.approx(sums("code", steps) / 2)
    assert [round(sums("unit", steps), 3) for steps in (20, 28, 40, 50)] == [0.537, 0.526, 0.518, 0.514]
    assert [round(sums("step", steps), 2) for steps in (20, 28, 40, 50)] == [6.63, 7.23, 7.89, 8.3]
    assert [sums("relative", s) / 12 for s in (20, 50)] == pytest.approx([sums("unit", s) for s in (20, 50)], rel=1e-5)
    for at in walked(28):
        t = 1 - at.sigma
        assert GAINS["step"](at) == pytest.approx((1 - t) * 2 * (1 - t + at.height) / (t + at.height))
        assert at.height * float(GAINS["step"](at)) <= 2 * (1 + at.height)


def test_a_relative_push_is_a_share_of_each_velocity() -> None:
    source = torch.Generator().manual_seed(0)
    velocity, gradient = (torch.randn(3, 4, 5, 2, generator=source) for _ in range(2))
    gradient[1] *= 1e-9
    gradient[2] = 0
    found: Any = GAINS["relative"](Push(0.6, 0.1, velocity, gradient))
    for i, share in enumerate((0.6, 0.6, 0.0)):
        pushed = found[i] * gradient[i]
        assert float(pushed.norm() / velocity[i].norm()) == pytest.approx(share)
    assert found.isfinite().all()


# ---- options ---------------------------------------------------------------------------------------


def test_names_are_those_of_the_code() -> None:
    assert (tuple(COSTS), tuple(GAINS)) == (options.LOSSES, options.GAINS)
    assert rooms(FocusOptions).keys() == {"Several subjects"}


def test_what_options_may_be() -> None:
    check_options(FocusOptions())
    check_options(FocusOptions("horse; bear", 4.0, "jedi", 0.5, "relative"))


@pytest.mark.parametrize(("given", "message"), [
    ({"focus": "horse;"}, "focus is 'horse;': expected words of the prompt"),
    ({"focus": ""}, "focus is '': expected words"),
    ({"focus": "a", "focus_scale": -1.0}, "focus_scale is -1.0: expected a number from 0 to 1000"),
    ({"focus": "a", "focus_until": 1.5}, "focus_until is 1.5: expected a number from 0 to 1"),
    ({"focus": "a", "focus_loss": "x"}, "focus_loss is 'x': expected one of focus, conform"),
    ({"focus": "a", "focus_gain": "x"}, "focus_gain is 'x': expected one of code, mem"),
    ({"focus_scale": 2.0}, "focus_scale is 2.0, but focus is not given"),
    ({"focus_loss": "jedi"}, "focus_loss is 'jedi', but focus is not given"),
    ({"focus_until": 0.0}, "focus_until is 0.0, but focus is not given"),
    ({"focus_gain": "unit"}, "focus_gain is 'unit', but focus is not given"),
])  # fmt: skip
def test_what_options_may_not_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_options(FocusOptions(**given))
