"""Which noise levels a run visits. A sigma is the share of noise: 1 is noise alone, 0 is the picture."""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mmdit.common.errors import SettingsError

Schedule = Callable[[int, float], Tensor]  # of steps and shift: (steps + 1,) from 1 to 0, float32

_TRAINED = 1000  # levels of the training schedule
_BETA = 0.6  # both parameters of the distribution that `beta` has its name from
_RHO = 7.0  # of `karras`


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels in [0, 1] towards noise for shift > 1: s t / (1 + (s - 1) t).

    Esser et al. 2024 (arXiv 2403.03206), equation 23, for pictures of higher resolution.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shift_for(shift: float, area: float, usual: float) -> float:
    """The shift for pictures of another size: the model's own, times the root of how many times the tokens they have.

    Esser et al. 2024 (arXiv 2403.03206), equation 23 and the text above it. area, usual: of the picture and of those
    that the model's own shift is for, in any unit.
    """
    return shift * math.sqrt(area / usual)


def shifted_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The noise levels of SD3's published pipelines: `steps` falling values from 1, then 0; float32 `(steps + 1,)`.

    Evenly spaced from 1 down to the smallest level of a 1000-step training schedule, which is shifted already, and
    then all shifted; so the smallest is shifted twice, and with shift 3 the last step begins at 0.0089286.
    Stability AI, sd3.5 `get_sigmas`; diffusers `FlowMatchEulerDiscreteScheduler`; ComfyUI `normal`.

    This and the other schedules raise ValueError for fewer than one step or a shift that is not positive.
    """
    _check(steps, shift)
    spaced = torch.linspace(1.0, _smallest(shift), steps, dtype=torch.float64)
    return _to_zero(shift_sigma(spaced, shift))


def sgm_uniform(steps: int, shift: float = 3.0) -> Tensor:
    """As `shifted_sigmas`, in steps + 1 levels without the last, so that no step is spent on hardly any noise.

    ComfyUI `sgm_uniform`.
    """
    _check(steps, shift)
    spaced = torch.linspace(1.0, _smallest(shift), steps + 1, dtype=torch.float64)
    return _to_zero(shift_sigma(spaced[:-1], shift))


def simple(steps: int, shift: float = 3.0) -> Tensor:
    """Evenly spaced entries of the 1000 trained levels, from the top. ComfyUI `simple`."""
    _check(steps, shift)
    picked = [_TRAINED - 1 - int(i * (_TRAINED / steps)) for i in range(steps)]
    return _to_zero(_trained(shift)[picked])


def beta(steps: int, shift: float = 3.0) -> Tensor:
    """Entries of the 1000 trained levels at even quantiles of the beta distribution (0.6, 0.6): dense at both ends.

    Lee et al. 2024 (arXiv 2407.12173), section 3.3. ComfyUI `beta`, which leaves out levels that come twice.
    """
    _check(steps, shift)
    quantiles = 1 - torch.arange(steps, dtype=torch.float64) / steps
    # The entry nearest to 999 times the inverse of the distribution is how many of the halves between lie below it.
    # Only 499.5 may be met, at the quantile 1/2: it goes up, to an even number, as NumPy rounds.
    halves = (torch.arange(1, _TRAINED, dtype=torch.float64) - 0.5) / (_TRAINED - 1)
    picked = torch.searchsorted(incomplete_beta(halves, _BETA), quantiles + 1e-12)
    return _to_zero(_trained(shift)[picked])


def karras(steps: int, shift: float = 3.0) -> Tensor:
    """Even in the 7th root, between the largest and the smallest trained level.

    Karras et al. 2022 (arXiv 2206.00364), equation 5 with rho = 7. ComfyUI and k-diffusion `karras`.
    """
    _check(steps, shift)
    smallest = _smallest(shift) ** (1 / _RHO)
    return _to_zero(torch.linspace(1.0, smallest, steps, dtype=torch.float64) ** _RHO)


def exponential(steps: int, shift: float = 3.0) -> Tensor:
    """Even in the logarithm, between the largest and the smallest trained level. ComfyUI and k-diffusion."""
    _check(steps, shift)
    return _to_zero(torch.linspace(0.0, math.log(_smallest(shift)), steps, dtype=torch.float64).exp())


def linear(steps: int, shift: float = 3.0) -> Tensor:
    """Even from 1 to 0, shifted once. Esser et al. 2024 (arXiv 2403.03206), equation 23; Black Forest Labs' FLUX."""
    _check(steps, shift)
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).float()


def discrete(steps: int, shift: float = 3.0) -> Tensor:
    """Evenly spaced over the trained levels from the largest to the smallest, shifted once.

    stable-diffusion.cpp `discrete`.
    """
    _check(steps, shift)
    return _to_zero(shift_sigma(torch.linspace(1.0, 1 / _TRAINED, steps, dtype=torch.float64), shift))


SCHEDULES: dict[str, Schedule] = {
    "normal": shifted_sigmas,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
    "karras": karras,
    "exponential": exponential,
    "linear": linear,
    "discrete": discrete,
}


@lru_cache(maxsize=64)
def scheduled(name: str, steps: int, shift: float) -> Tensor:
    """The levels of a schedule, not to be written to; SettingsError where it has no so many that differ."""
    spaced = SCHEDULES[name]
    if not falls(spaced(steps, shift)):
        fewer = bisect_left(range(1, steps), True, key=lambda n: not falls(spaced(n, shift)))
        raise SettingsError(f"schedule {name} has no {steps} levels that differ, but {fewer} (shift {shift:g})")
    return spaced(steps, shift)


def falls(sigmas: Tensor) -> bool:
    """Whether each level is less than the one before."""
    return bool((sigmas.diff() < 0).all())


def incomplete_beta(x: Tensor, a: float) -> Tensor:
    """The share of a beta distribution with both parameters `a` that lies below x in [0, 1]; float64 in and out.

    The series x^a / B(a, a) times the sum of (1 - a)_n x^n / (n! (a + n)), for x up to 1/2, and by symmetry above.
    NIST Digital Library of Mathematical Functions, 8.17.7.
    """
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    low = torch.minimum(x, 1 - x)
    term, total = torch.ones_like(low), torch.zeros_like(low)
    for n in range(60):  # 2^-60 is below the rounding of float64
        total = total + term / (a + n)
        term = term * low * (1 - a + n) / (n + 1)
    share = low**a * total / whole
    return torch.where(x <= 0.5, share, 1 - share)


def _check(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be above 0")


def _trained(shift: float) -> Tensor:
    """The levels of the training schedule, rising, `(1000,)`, float64."""
    return shift_sigma(torch.arange(1, _TRAINED + 1, dtype=torch.float64) / _TRAINED, shift)


def _smallest(shift: float) -> float:
    return float(_trained(shift)[0])


def _to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
