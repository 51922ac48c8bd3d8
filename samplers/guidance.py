"""Guidance: turning what a model predicts for several texts into one velocity."""

from torch import Tensor

from samplers.flow import NEGATIVE, PROMPT, Evaluation, Guidance, Guiding


def unguided(x: Tensor, sigma: Tensor) -> Guiding:
    """The prediction for the prompt alone."""
    (velocity,) = yield Evaluation(x, sigma, (PROMPT,))
    return velocity


def classifier_free_guidance(scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
    """Push the prediction for the prompt away from that for the negative prompt, both in one evaluation.

    Ho & Salimans 2022 (arXiv 2207.12598), equation 6 with w = scale - 1: uncond + scale (cond - uncond).

    interval: the least and the greatest sigma at which there is guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724);
    at others the prompt is predicted alone. Scale 1 equals the prompt's prediction alone, which costs half: take
    `unguided` then.
    """
    (low, high), scale = interval, float(scale)  # a whole number may be more than a tensor takes

    def guide(x: Tensor, sigma: Tensor) -> Guiding:
        if not low <= float(sigma) <= high:
            return (yield from unguided(x, sigma))
        cond, uncond = yield Evaluation(x, sigma, (PROMPT, NEGATIVE))
        return uncond + scale * (cond - uncond)

    return guide
