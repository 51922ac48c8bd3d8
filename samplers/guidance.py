"""Guidance: turning what a model predicts for several texts, or changed, into one velocity.

A guidance is made of terms, one after another. Each says what it wants to know, and changes the velocity that those
before it made; all that they want to know is one evaluation. A term may remember what it saw: make it anew for each
picture.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.flow import NEGATIVE, Ask, Evaluation, Guidance, Guiding, Moment

COND, UNCOND = Ask(), Ask(NEGATIVE)

Given = Mapping[Ask, Any]  # velocities, and of those who look, Sights
Scale = Callable[[Moment], float]


class Term(NamedTuple):
    """A part of a guidance."""

    asks: Callable[[Moment], Sequence[Ask]]  # what it wants to know; nothing where it is not to act
    act: Callable[[Tensor, Given, Moment], Tensor]  # of the velocity so far and what was asked: the velocity


def combined(*terms: Term) -> Guidance:
    """The prediction for the prompt, as these terms change it, one after another."""

    def guide(at: Moment) -> Guiding:
        wanted = [(term, asks) for term in terms if (asks := term.asks(at))]
        every = dict.fromkeys([COND, *(ask for _, asks in wanted for ask in asks)])
        seen = {ask: ask._replace(look=None) for ask in every if ask.look is not None}
        asked = tuple(ask for ask in every if ask not in seen.values())  # who looks is told the velocity too
        given: dict[Ask, Any] = dict(zip(asked, (yield Evaluation(at, asked))))
        given |= {plain: given[ask].velocity for ask, plain in seen.items()}
        velocity = given[COND]
        for term, _ in wanted:
            velocity = term.act(velocity, given, at)
        return velocity

    return guide


unguided = combined()


# ---- between texts ---------------------------------------------------------------------------------


def classifier_free_guidance(scale: float | Scale, interval: tuple[float, float] = (0.0, 1.0)) -> Term:
    """Push the prediction for the prompt away from that for the negative prompt.

    Ho & Salimans 2022 (arXiv 2207.12598), equation 6 with w = scale - 1: uncond + scale (cond - uncond).

    scale: a number, or one for each moment. interval: the least and the greatest sigma at which there is guidance
    (Kynkäänniemi et al. 2024, arXiv 2404.07724); at others the prompt is predicted alone. Scale 1 equals the prompt's
    prediction alone, which costs half: leave the term out then.
    """

    def act(cond: Tensor, given: Given, at: Moment) -> Tensor:
        uncond = given[UNCOND]
        return uncond + _at(scale, at) * (cond - uncond)

    return Term(_within(interval), act)


def zero_star_guidance(scale: float | Scale, interval: tuple[float, float] = (0.0, 1.0)) -> Term:
    """CFG-Zero*: the negative's prediction is scaled to fit the prompt's before it is pushed from.

    Fan et al. 2025 (arXiv 2503.18886), algorithm 1: s uncond + scale (cond - s uncond), s = <cond, uncond> / |uncond|²
    of each picture. Its other half, a first step
    of nothing, is the `rest` of `drawing`. Arguments as of classifier-free guidance.
    """

    def act(cond: Tensor, given: Given, at: Moment) -> Tensor:
        uncond = given[UNCOND]
        fitted = uncond * (_dot(cond, uncond) / _dot(uncond, uncond).clamp(min=1e-8))
        return fitted + _at(scale, at) * (cond - fitted)

    return Term(_within(interval), act)


def projected_guidance(
    scale: float | Scale,
    eta: float = 0.0,
    most: float = math.inf,
    momentum: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Term:
    """Adaptive projected guidance: of the push between the predictions, what points along the prompt's is weakened.

    Sadat et al. 2024 (arXiv 2410.02416), algorithm 1, on predicted clean latents as there: x - sigma velocity.

    eta: how much of the parallel part stays; 1, without limit and momentum, is classifier-free guidance. most: the norm
    that a push of one picture may have. momentum: how much of the last push is added, negative in the paper. The other
    arguments as of classifier-free guidance.
    """
    last: Tensor | None = None

    def act(cond: Tensor, given: Given, at: Moment) -> Tensor:
        nonlocal last
        sigma = float(at.sigma)
        clean, push = at.x - sigma * cond, sigma * (given[UNCOND] - cond)  # of predicted clean latents
        push = last = push if last is None or momentum == 0 else push + momentum * last
        if most < math.inf:
            push = push * (most / _dot(push, push).sqrt().clamp(min=1e-8)).clamp(max=1.0)
        along = clean * (_dot(push, clean) / _dot(clean, clean).clamp(min=1e-8))
        return cond - (_at(scale, at) - 1) / sigma * (push - along + eta * along)

    return Term(_within(interval), act)


def composition(weights: Mapping[str, float]) -> Term:
    """Other texts pull as the prompt does, each by its weight: cond + sum of weight (text - uncond).

    Liu et al. 2022 (arXiv 2206.01714), equation 11, the prompt's weight 1. It comes before the guidance, whose scale
    holds for all. weights: by the names of the texts; a negative one pushes away.
    """
    others = {Ask(name): weight for name, weight in weights.items()}

    def act(cond: Tensor, given: Given, _: Moment) -> Tensor:
        return cond + sum(weight * (given[ask] - given[UNCOND]) for ask, weight in others.items())

    return Term(lambda _: (UNCOND, *others), act)


def rescaled(share: float) -> Term:
    """Bring the spread of a guided velocity back to that of the prompt's prediction, by this share of the way.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16. It comes last. share: 0 to 1.
    """

    def act(velocity: Tensor, given: Given, _: Moment) -> Tensor:
        dims = tuple(range(1, velocity.ndim))
        spread = given[COND].std(dim=dims, keepdim=True) / velocity.std(dim=dims, keepdim=True).clamp(min=1e-8)
        return torch.lerp(velocity, velocity * spread, share)

    return Term(lambda _: (COND,), act)


# ---- from a worse prediction -----------------------------------------------------------------------


def away_from(change: Hashable, scale: float, when: Callable[[Moment], bool] = lambda _: True) -> Term:
    """Push away from the prediction of the network as changed: velocity + scale (cond - worse).

    With blocks left out it is skip-layer guidance (Stability AI, sd3.5, `SkipLayerCFGDenoiser`); with attention
    perturbed, Ahn et al. 2024 (arXiv 2403.17377), equation 8.

    change: how the network is changed. when: whether it acts at a moment.
    """
    worse = Ask(change=change)

    def asks(at: Moment) -> Sequence[Ask]:
        return (worse,) if when(at) else ()

    return Term(asks, lambda velocity, given, _: velocity + scale * (given[COND] - given[worse]))


# ---- over the steps --------------------------------------------------------------------------------


def rising(scale: float, shape: str) -> Scale:
    """A guidance scale that rises from 1 at the first step, and whose mean over all steps is `scale`.

    Wang et al. 2024 (arXiv 2404.13040), section 4. shape: "linear" or "cosine".
    """

    def at(moment: Moment) -> float:
        way = moment.step / (moment.steps - 1) if moment.steps > 1 else 0.5  # 0 at the first step, 1 at the last
        return 1 + (scale - 1) * (2 * way if shape == "linear" else 1 - math.cos(math.pi * way))

    return at


def cached(guidance: Guidance, threshold: float) -> Guidance:
    """Take a velocity again where the next would hardly differ: such a point costs nothing.

    How much it would differ is told by how far the latents came since the last evaluation, times how much the velocity
    changed for that between the last two, relative to the velocity. Zhou et al. 2025 (arXiv 2507.02860), equations 5
    to 8, measured here from the last evaluation. The first step and the last are always evaluated.
    threshold: the relative change up to which none is made, 0.05 for instance.
    """
    seen: list[tuple[Tensor, Tensor]] = []  # latents and velocity of the last evaluation
    rate: Tensor | None = None

    def guide(at: Moment) -> Guiding:
        nonlocal rate
        if seen and rate is not None and 0 < at.step < at.steps - 1:
            x, velocity = seen[-1]
            if float(rate * _size(at.x - x) / _size(velocity)) < threshold:
                return velocity
        velocity = yield from guidance(at)
        if seen and at.step > 0:
            x, before = seen.pop()
            rate = _size(velocity - before) / _size(at.x - x).clamp(min=1e-8)
        seen[:] = [(at.x, velocity)]
        return velocity

    return guide


def _at(scale: float | Scale, at: Moment) -> float:
    return float(scale(at) if callable(scale) else scale)  # a whole number may be more than a tensor takes


def _within(interval: tuple[float, float]) -> Callable[[Moment], Sequence[Ask]]:
    low, high = interval
    return lambda at: (UNCOND,) if low <= float(at.sigma) <= high else ()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each picture's numbers, `(B, 1, ...)`."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _size(x: Tensor) -> Tensor:
    return x.abs().mean()
