"""FOCUS as the last term of a guidance: the velocity is pushed down the cost of how subjects share the attention.

Bill et al. 2025 (arXiv 2510.02315): control at test time. The pass that finds the gradient is the prompt's own
evaluation, so guidance costs no other.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.flow import Ask, Moment, Sight
from samplers.focus.costs import Cost
from samplers.focus.gains import Gain, Push
from samplers.guidance import Given, Term

Looking = Callable[[Callable[[Tensor], Tensor] | None], Hashable]  # of a cost or none: a look in the network's words


class Attended(NamedTuple):
    """What was seen at a moment, and what was made of it; cost, slope and push are None where nothing was pushed."""

    maps: Tensor  # (blocks, tokens, rows, columns), float32
    cost: Tensor | None = None
    slope: Tensor | None = None  # the length of the cost's gradient
    push: Tensor | None = None  # the length of the push, relative to the velocity's


class Controller:
    """Looks where it is asked, and pushes where that is wanted; `term` is its term of a guidance, for one picture."""

    def __init__(
        self,
        look: Looking,
        cost: Cost | None = None,
        picked: Sequence[int] = (),
        scale: float = 0.0,
        gain: Gain = lambda at: at.sigma,
        until: float = 0.0,
        height: Callable[[float], float] = lambda sigma: sigma,
        always: bool = False,
    ) -> None:
        """look: makes a look of a cost. cost: of the maps of the tokens `picked` among those that are looked at.

        scale, gain: how hard it pushes. until: it rests at lower noise levels. height: of a noise level, by how much
        the step from there lowers it. always: it looks where it rests too.
        """
        self._seen: Attended | None = None
        self._look, self._cost, self._picked = look, cost, list(picked)
        self._scale, self._gain, self._until, self._height, self._always = scale, gain, until, height, always
        self._ask = Ask()
        self._last: tuple[int, Tensor] | None = None  # step and maps of the last evaluation
        self.term = Term(self._asks, self._act)

    def _asks(self, at: Moment) -> Sequence[Ask]:
        if self._cost is not None and float(at.sigma) >= self._until:
            if self._last is not None and self._last[0] != at.step:
                self._cost = self._cost.next(self._of(self._last[1]))
            cost = self._cost
            self._ask = Ask(look=self._look(lambda maps: cost(self._of(maps))))
        elif self._always:
            self._ask = Ask(look=self._look(None))
        else:
            return ()
        return (self._ask,)

    def _of(self, maps: Tensor) -> Tensor:
        return torch.stack([maps[:, token] for token in self._picked], dim=1)

    def _act(self, velocity: Tensor, given: Given, at: Moment) -> Tensor:
        sight: Sight = given[self._ask]
        if sight.gradient is None:
            self._seen = self._seen or Attended(sight.maps)
            return velocity
        self._last = at.step, sight.maps
        gradient = sight.gradient.to(velocity)
        sigma = float(at.sigma)
        push = self._scale * self._gain(Push(sigma, self._height(sigma), velocity, gradient)) * gradient
        self._seen = self._seen or Attended(sight.maps, sight.cost, gradient.norm(), push.norm() / velocity.norm())
        return velocity + push

    def taken(self) -> Attended | None:
        """What it saw first since this was asked last: where a step began; None where it did not look."""
        seen, self._seen = self._seen, None
        return seen
