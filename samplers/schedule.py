"""Which noise levels a run visits. A sigma is the share of noise: 1 is noise alone, 0 is the picture."""

from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[int, float], Tensor]  # of steps and shift


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels in [0, 1] towards noise for shift > 1: s t / (1 + (s - 1) t).

    Esser et al. 2024 (arXiv 2403.03206), equation 23, for pictures of higher resolution.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shifted_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The noise levels of SD3's published pipelines: `steps` falling values from 1, then 0; float32 `(steps + 1,)`.

    Evenly spaced from 1 down to the smallest level of a 1000-step training schedule, which is shifted already, and
    then all shifted; so the smallest is shifted twice, and with shift 3 the last step begins at 0.0089286.
    Stability AI, sd3.5 `get_sigmas`; diffusers `FlowMatchEulerDiscreteScheduler`; ComfyUI `normal`.

    Raises ValueError for fewer than one step or a shift that is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be above 0")
    smallest = shift_sigma(torch.tensor(1 / 1000, dtype=torch.float64), shift)
    spaced = torch.linspace(1.0, float(smallest), steps, dtype=torch.float64)
    return torch.cat([shift_sigma(spaced, shift), torch.zeros(1, dtype=torch.float64)]).float()


SCHEDULES: dict[str, Schedule] = {"normal": shifted_sigmas}
