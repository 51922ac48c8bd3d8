"""Guidance: turning what a model predicts for several texts into one velocity."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def classifier_free_guidance(velocity: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Push the prediction for the prompt away from that for the negative prompt, in one call of the model.

    Ho & Salimans 2022 (arXiv 2207.12598), equation 6 with w = scale - 1: uncond + scale (cond - uncond).

    velocity: takes a batch twice as large, `(2 B, ...)`; its first half is predicted with the prompt, its second
    with the negative prompt. interval: the least and the greatest sigma at which there is guidance (Kynkäänniemi et
    al. 2024, arXiv 2404.07724); at others `velocity` is given `(B, ...)`, to predict with the prompt alone. Returns a
    velocity for `(B, ...)`. Scale 1 equals the prompt's prediction alone, which costs half: leave the guidance out
    then.
    """

    low, high = interval

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        if not low <= float(sigma) <= high:
            return velocity(x, sigma)
        cond, uncond = velocity(torch.cat([x, x]), sigma).chunk(2)
        return uncond + scale * (cond - uncond)

    return guided
