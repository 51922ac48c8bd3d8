"""Keeping parts of a picture that another begins with."""

from collections.abc import Callable

import torch
from torch import Tensor

from samplers.flow import Step


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents at a noise level: Esser et al. 2024 (arXiv 2403.03206), equation 13."""
    return sigma * noise + (1 - sigma) * clean


def keeping(clean: Tensor, noise: Tensor, mask: Tensor, sigmas: Tensor) -> Callable[[Step], Tensor]:
    """After each step, cells that are not free yet are the clean latents again, at the noise level that was reached.

    clean, noise: `(B, C, h, w)`. mask: `(B, 1, h, w)`, 0 to 1. sigmas: `(steps + 1,)`. A cell with mask m is free from
    the share 1 - m of the steps on; one with 0 never is, and ends as the clean latents. With 0 and 1 alone it is the
    blending of Lugmayr et al. 2022 (arXiv 2201.09865) and of diffusers; with what lies between, differential diffusion
    (Levin & Fried 2023, arXiv 2306.00950, algorithm 1).
    """
    steps = len(sigmas) - 1

    def keep(step: Step) -> Tensor:
        done = step.index + 1
        held = (mask < 1 - done / steps) | (mask == 0)
        return torch.where(held, noised(clean, noise, sigmas[done]), step.x)

    return keep
