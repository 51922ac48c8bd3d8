"""What solvers and guidance are: generators that ask for what they need, so that any number of them can be answered
together.

A solver walks along d x / d sigma = velocity(x, sigma). It yields a `Point` where it needs the velocity and is sent it;
a `Noise` where it needs fresh noise and is sent that; and a `Step` when one is done, and is sent the latents to go on
with, the step's own unless somebody changed them. It returns the last. A guidance makes that velocity: it yields the
`Evaluation`s of the network that it needs, is sent for each an answer to everything asked in it, and returns one.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from functools import update_wrapper
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")

PROMPT, NEGATIVE = "prompt", "negative"  # the texts that a picture has, one or both

Velocity = Callable[[Tensor, Tensor], Tensor]  # of latents and sigma, shaped as the latents


class Point(NamedTuple):
    """Where a solver needs the velocity."""

    x: Tensor  # (B, ...)
    sigma: Tensor  # a scalar on the CPU: reading it must not wait for a GPU


class Noise(NamedTuple):
    """Where a solver needs noise that it has not used before, of variance 1, shaped as these latents."""

    like: Tensor


class Step(NamedTuple):
    """A step that was taken."""

    index: int  # 0 to steps - 1
    sigma: Tensor  # the noise level that it began at
    velocity: Tensor  # the velocity there, after guidance, shaped as x
    before: Tensor  # the latents there
    x: Tensor  # the latents after the step

    @property
    def denoised(self) -> Tensor:
        """The clean latents that the velocity points to: x = (1 - sigma) clean + sigma noise, velocity = noise - clean.

        Esser et al. 2024 (arXiv 2403.03206), equations 13 and 14.
        """
        return self.before - self.sigma * self.velocity


class Moment(NamedTuple):
    """A solver's point, with how far it has come."""

    x: Tensor
    sigma: Tensor
    step: int = 0  # of those that it takes, the one that it is in
    steps: int = 1

    @property
    def share(self) -> float:
        """The share of the steps that are done, 0 to less than 1."""
        return self.step / self.steps


class Ask(NamedTuple):
    """A velocity that a guidance wants: for one of the picture's texts, by the network as it is, or changed."""

    text: str = PROMPT
    change: Hashable = None  # how the network is changed, in its own words; None: not at all
    look: Hashable = None  # what else is wanted to be seen there, in its own words; then a Sight is sent


class Sight(NamedTuple):
    """A velocity, and what was seen where it was predicted."""

    velocity: Tensor
    maps: Tensor  # (blocks, tokens, rows, columns): how much the picture's places attend to what was looked at
    cost: Tensor | None = None  # of the maps, where the look had one
    gradient: Tensor | None = None  # of the cost, with respect to the latents, shaped as they are


class Evaluation(NamedTuple):
    """What a guidance asks of the network at a moment, all at once."""

    at: Moment
    asks: tuple[Ask, ...]


Solving = Generator[Point | Noise | Step, Tensor, Tensor]
Answer = Any  # to an Ask: a velocity, or a Sight
Guiding = Generator[Evaluation, Sequence[Answer], Tensor]
Guidance = Callable[[Moment], Guiding]
Predict = Callable[[Moment, tuple[Ask, ...]], Sequence[Answer]]  # an Evaluation's parts to what it is sent
Source = Callable[[Tensor], Tensor]  # of latents: noise of their shape


def _levels(sigmas: Tensor) -> Tensor:
    return sigmas[:-1]


class Solver:
    """A solver, made by decorating its generator with `solver`."""

    def __init__(self, steps: Callable[[Tensor, Tensor], Solving], levels: Callable[[Tensor], Tensor]) -> None:
        """steps: of latents and sigmas. levels: all noise levels that it will ask for on its way along `sigmas`."""
        self.steps, self.levels = steps, levels
        update_wrapper(self, steps)

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        callback: Callable[[Step], object] | None = None,
        noise: Source = torch.randn_like,
    ) -> Tensor:
        """The latents at `sigmas[-1]`, from the latents x at `sigmas[0]`.

        velocity: takes x and a scalar sigma. x: of any shape; keep it in float32, since the small last steps would
        drown in a shorter type. sigmas: falling, `(steps + 1,)`. callback: called after each step; what it raises ends
        the run. noise: where a stochastic solver takes its noise from.
        """

        def answer(told: Point | Noise | Step) -> Tensor:
            if isinstance(told, Point):
                return velocity(*told)
            if isinstance(told, Noise):
                return noise(told.like)
            if callback is not None:
                callback(told)
            return told.x

        return answered(self.steps(x, sigmas), answer)


def solver(levels: Callable[[Tensor], Tensor] = _levels) -> Callable[[Callable[[Tensor, Tensor], Solving]], Solver]:
    """Make a generator of latents and sigmas a Solver.

    levels: the noise levels that it asks for, of sigmas; where none is given, those at which steps begin.
    """
    return lambda steps: Solver(steps, levels)


def drawing(
    solver: Solver,
    guidance: Guidance,
    x: Tensor,
    sigmas: Tensor,
    watch: Callable[[Step], Tensor],
    noise: Source = torch.randn_like,
    rest: int = 0,
) -> Generator[Evaluation, Sequence[Answer], Tensor]:
    """One picture's whole way, from noise x to the latents that it returns, as questions to the network.

    watch: called after each step; gives the latents to go on with. noise: as a Solver takes it. rest: so many steps at
    the beginning change and ask nothing, and the solver knows none of them (Fan et al. 2025, arXiv 2503.18886, section
    4.2).
    """
    answer, done, steps = None, 0, len(sigmas) - 1
    for done, sigma in enumerate(sigmas[:rest], 1):
        yield Evaluation(Moment(x, sigma, done - 1, steps), ())
        x = watch(Step(done - 1, sigma, torch.zeros_like(x), x, x))
    solving: Any = solver.steps(x, sigmas[rest:])
    while True:
        try:
            told = solving.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(told, Point):
            answer = yield from guidance(Moment(*told, done, steps))
        elif isinstance(told, Noise):
            answer = noise(told.like)
        else:
            done, answer = done + 1, watch(told._replace(index=done))


def guided(predict: Predict, guidance: Guidance) -> Velocity:
    """The velocity that a guidance makes of a network, for a solver that is called as a function.

    A guidance that looks at how many steps are done takes every point for one of the first step.
    """
    return lambda x, sigma: answered(guidance(Moment(x, sigma)), lambda asked: predict(*asked))


def answered(asking: Generator[Q, A, R], answer: Callable[[Q], A]) -> R:
    """What a generator returns in the end, each of its questions answered."""
    given: Any = None
    while True:
        try:
            question = asking.send(given)
        except StopIteration as end:
            return end.value
        given = answer(question)
