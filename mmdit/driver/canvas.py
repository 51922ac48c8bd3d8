"""Pictures that are on their way together: what each asks of the network, answered by one evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmdit.altered import Change
from mmdit.control.rows import Control
from mmdit.driver.controlling import Controlling
from mmdit.driver.focusing import Focusing
from mmdit.driver.sampling import rest_of, solver_of
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.driver.texts import Text, Texts, texts_of
from mmdit.driver.watch import Event, Stepped
from mmdit.maps import Look
from mmdit.prepared import Prepared, Row
from samplers import Answer, Ask, Evaluation, Guidance, Moment, Sight, Source, Step, Term, drawing


class Picture:
    """A picture on its way: what it asks the network next, and when that is nothing more, its latents."""

    def __init__(
        self,
        index: int,
        settings: Settings,
        start: Tensor,
        sigmas: Tensor,
        tell: Callable[["Picture", Event], None],
        guidance: Callable[[Sequence[Term]], Guidance],
        focusing: Focusing,
        source: Callable[[], Source],
        keep: Callable[[Step], Tensor] | None = None,
    ) -> None:
        """start: `(1, C, h, w)`, float32, where it is to be denoised. sigmas: the noise levels of its steps.

        tell: called after each of them. guidance, source: make its guidance, of terms that come last, and the noise
        that a stochastic solver takes, anew. keep: gives the latents to go on with after a step, if not the step's own.
        """
        self.index, self.settings, self.start, self.sigmas = index, settings, start, sigmas
        self.prepared: Prepared | None = None
        self.controls: list[Controlling] = []
        self.nets: dict[str, Prepared] = {}  # its texts, by the ControlNets
        self.texts: dict[str, int] = {}  # its rows in `prepared`
        self.stopped = False
        self._tell, self._guidance, self._focusing, self._source = tell, guidance, focusing, source
        self._solver, self._rest, self._keep = solver_of(settings), rest_of(settings), keep
        self.begin()

    def begin(self) -> None:
        self._controllers = self._focusing.controllers()
        guidance, source = self._guidance([controller.term for controller in self._controllers]), self._source()
        self._way: Any = drawing(self._solver, guidance, self.start, self.sigmas, self._step, source, self._rest)
        self.latents: Tensor | None = None
        self._send(None)

    def answer(self, velocities: Sequence[Answer]) -> None:
        """Go on with what was asked for, until the next question or the end; after an error, it begins anew."""
        try:
            self._send(velocities)
        except BaseException:
            self.begin()  # what it was on its way through is closed
            raise

    def _send(self, velocities: Sequence[Answer] | None) -> None:
        try:
            self.asked: Evaluation | None = self._way.send(velocities)
        except StopIteration as end:
            self.asked, self.latents = None, end.value

    def levels(self) -> list[float]:
        """The noise levels that are still to come."""
        assert self.asked is not None
        return [
            level
            for level in self._solver.levels(self.sigmas[self._rest :]).tolist()
            if level <= float(self.asked.at.sigma)
        ]

    def controlled(self, at: Moment) -> list[Control]:
        """What controls it at this moment."""
        now = [c for c in self.controls if c.controls(at.step, at.steps)]
        return [Control(self.nets[c.net], c.latent, c.scale, c.way) for c in now]

    def _step(self, step: Step) -> Tensor:
        step = step if self._keep is None else step._replace(x=self._keep(step))
        sheet = self._focusing.sheet(self._controllers)
        self._tell(self, Stepped(settings=self.settings, index=self.index, step=step, attention=sheet))
        return step.x


class Asked(NamedTuple):
    """A question on its way to the network."""

    row: Row
    picture: Picture
    ask: Ask
    x: Tensor  # (1, C, h, w)
    controls: list[Control]


class Canvas:
    """Pictures that are denoised together, each at a noise level of its own; they come and go between steps."""

    def __init__(self, stages: Stages, texts: Texts) -> None:
        """texts: all that the pictures have, encoded."""
        self._stages, self._texts = stages, texts
        self.rows: int | None = None  # of a batch at most; None: all that is asked for at a time
        self.most: int | None = None  # of them with gradients
        self.on_way: list[Picture] = []  # add to it between steps
        self.done: list[Picture] = []

    def leave(self, most: int = 0) -> list[Picture]:
        """Forget what was prepared, and let go all pictures but the first so many; they may come back."""
        for picture in self.on_way:
            picture.prepared, picture.nets = None, {}
        gone, self.on_way = self.on_way[most:], self.on_way[:most]
        return gone

    @torch.no_grad()
    def step(self) -> None:
        """Answer every picture's question, all by one evaluation of the network, or as few as there is room for."""
        self._prepare([picture for picture in self.on_way if picture.prepared is None])
        asked: list[Asked] = []
        for picture in self.on_way:
            assert picture.asked is not None and picture.prepared is not None
            at, asks = picture.asked
            controls = picture.controlled(at)
            for ask in asks:
                change, look = cast(Change | None, ask.change), cast(Look | None, ask.look)
                row = Row(picture.prepared, float(at.sigma), picture.texts[ask.text], change, look)
                asked.append(Asked(row, picture, ask, at.x, controls))
        # As `predict` likes it best; what is changed comes last.
        asked.sort(key=lambda one: (id(one.row.prepared), -one.row.sigma, str(one.row.change or ""), one.row.text))
        found = dict[tuple[int, Ask], Answer]()
        pushed, others = list[Asked](), list[Asked]()
        for one in asked:
            (others if one.row.look is None or one.row.look.cost is None else pushed).append(one)
        for ones, most in ((pushed, self.most), (others, self.rows)):
            most = most or max(1, len(ones))
            for some in (ones[first : first + most] for first in range(0, len(ones), most)):
                found |= self._answered(some)
        try:
            for picture in self.on_way:
                assert picture.asked is not None
                picture.answer([found[id(picture), ask] for ask in picture.asked.asks])
        finally:  # those before one that failed may be done
            now = [picture for picture in self.on_way if not picture.stopped]
            self.done += [picture for picture in now if picture.asked is None]
            self.on_way = [picture for picture in now if picture.asked is not None]

    def _answered(self, some: Sequence[Asked]) -> dict[tuple[int, Ask], Answer]:
        """The answers to these, by one evaluation."""
        latents, rows = torch.cat([one.x for one in some]), [one.row for one in some]  # (R, C, h, w)
        attention, controls = some[0].picture.settings.attention, [one.controls for one in some]
        if all(row.look is None for row in rows):
            velocities: Sequence[Answer] = self._stages.predict(latents, rows, attention, controls).split(1)
        else:
            velocity, seen = self._stages.look(latents, rows, attention, controls)
            velocities = [v if s is None else Sight(v, *s) for v, s in zip(velocity.split(1), seen)]
        return {(id(one.picture), one.ask): answer for one, answer in zip(some, velocities)}

    def _prepare(self, pictures: list[Picture]) -> None:
        """Have the texts of these pictures ready at the noise levels that they still ask for."""
        if not pictures:
            return
        texts: dict[Text, int] = {}
        for picture in pictures:
            own = texts_of(picture.settings)
            picture.texts = {name: texts.setdefault(text, len(texts)) for name, text in own.items()}
        levels = dict.fromkeys(level for picture in pictures for level in picture.levels())
        encoded = [self._texts[text] for text in texts]
        nets = dict.fromkeys(control.net for picture in pictures for control in picture.controls)
        by = {name: self._stages.prepare(encoded, levels, name) for name in ("transformer", *nets)}
        for picture in pictures:
            picture.prepared, picture.nets = by["transformer"], by
