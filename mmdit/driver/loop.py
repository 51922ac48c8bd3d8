"""The one loop: any number of pictures, step by step; each leaves it as soon as it is done."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from mmdit.altered import Change
from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked
from mmdit.control.options import ControlOptions
from mmdit.control.rows import Control
from mmdit.driver.controlling import Controlling, controlling
from mmdit.driver.focusing import Focusing, steep
from mmdit.driver.likeness import RULES
from mmdit.driver.pictures import enlarged
from mmdit.driver.sampling import changed, guidance_of, rest_of, sigmas_of, solver_of
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.driver.starting import Start, noise_of, started, way_of
from mmdit.driver.texts import Text, Texts, encode, parts, texts_of
from mmdit.driver.watch import Drawn, Encoded, Event, Finite, Progress, Stepped, Watcher
from mmdit.images.options import steps_of
from mmdit.maps import Look
from mmdit.memory.plan import Job, Plan
from mmdit.memory.residency import Mode, Role, of_role
from mmdit.prepared import Prepared, Row
from samplers import Answer, Ask, Evaluation, Guidance, Moment, Sight, Source, Step, Term, drawing
from samplers.noise import going_on

_TOKENS = {"cuda": 2**16}  # denoised at a time: more are no faster, and make the first picture late
_TOKENS_ELSEWHERE = 2**13

# What may differ between pictures that are drawn together: each row of a batch has its own. All else, whatever is
# added to Settings, has to agree.
OWN = marked(Settings, Mark.OWN)


def kind(s: Settings) -> Settings:
    """What pictures have in common that may be drawn together; hashable."""
    return replace(s, **{name: getattr(Settings, name) for name in OWN})


def control_of(s: Settings) -> object:
    """All that tells how a picture is controlled; hashable."""
    return tuple(getattr(s, f.name) for f in fields(ControlOptions)), s.width, s.height


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
        pushed = [one for one in asked if one.row.look is not None and one.row.look.cost is not None]
        for ones, most in ((pushed, self.most), ([one for one in asked if one not in pushed], self.rows)):
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


class Drawing:
    """Pictures to be drawn: iterating over it draws, and gives each with its index as soon as it is done."""

    def __init__(
        self,
        stages: Stages,
        pictures: Sequence[Settings],
        watchers: Sequence[Watcher] = (),
        seconds: dict[str, float] | None = None,
    ) -> None:
        """pictures: each with count 1, and as `Stages.check` returns it. seconds: of each stage, added up here.

        Raises SettingsError where one of them does not fit into the memory.
        """
        self._stages, self.pictures = stages, pictures
        self._seconds = {} if seconds is None else seconds
        self.settings: dict[int, Settings] = {}  # of the pictures begun: what each was drawn by
        self._controls: dict[object, list[Controlling]] = {}
        self._watchers, self._ended = [Finite(stages), *watchers], False
        self._patch = stages.transformer.config.patch_size * stages.vae.config.downscale  # pixels
        for s in {kind(s): s for s in sorted(pictures, key=steep)}.values():  # those that take the most of their kind
            for each in self._passes(s):
                with stages.turn:
                    stages.plan_for(stages.job(each))

    def _passes(self, s: Settings) -> list[Settings]:
        """What is drawn one after the other for one picture, the last being the result."""
        return [s] if s.upscale is None else [s, enlarged(s, self._patch)]

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        stages, steps = self._stages, sum(steps_of(each) for s in self.pictures for each in self._passes(s))
        with Progress(steps, len(self.pictures)) as bar:
            self._watchers.append(bar)
            try:
                for part, waiting in parts(stages, self.pictures):
                    if self._ended:
                        return
                    with stages.turn:
                        texts = encode(stages, [self.pictures[i] for i in part], waiting, self._seconds)
                    kinds: dict[Settings, list[int]] = {}
                    for i in part:
                        kinds.setdefault(kind(self.pictures[i]), []).append(i)
                    for alike in kinds.values():
                        yield from self._finished(alike, texts, waiting)
            finally:
                self._watchers.remove(bar)
                stages.let_go()

    def _finished(self, alike: list[int], texts: Texts, waiting: int) -> Iterator[tuple[int, Image.Image]]:
        """The pictures with these indices, which are of one kind, in one pass or two. waiting: bytes of `texts`."""
        for i, image in self._draw({i: self.pictures[i] for i in alike}, texts, waiting):
            if self.pictures[i].upscale is None:
                yield i, image
            else:
                yield from self._draw({i: enlarged(self.pictures[i], self._patch, image)}, texts, waiting)

    def _draw(self, alike: dict[int, Settings], texts: Texts, waiting: int) -> Iterator[tuple[int, Image.Image]]:
        """One pass of pictures, by their indices, which are of one kind."""
        first = next(iter(alike.values()))
        apart = len({tuple(texts_of(s).values()) for s in alike.values()}) > 1
        job = self._stages.job(first, waiting=waiting, apart=apart, changed=changed(first))
        job = job._replace(steep=any(map(steep, alike.values())))
        job = job._replace(count=self._at_a_time(job, len(alike)))
        canvas, queue = Canvas(self._stages, texts), deque[int | Picture](alike)
        with self._stages.turn:
            job, plan = self._plan(job)
        start: Start | None = None
        while queue and not self._ended:
            with self._stages.turn:
                self._stages.follow(plan, job)
                if first.init is not None and start is None:
                    start = self._stages.stage("init", job, self._seconds, partial(started, self._stages, first))
                self._encode_controls(alike.values(), job)
                begin = partial(self._begin, alike, start, texts)
                work = partial(self._denoise, canvas, queue, begin, job.texts + job.changed)
                self._stages.stage("denoise", job, self._seconds, work)
                plan = self._stages.ended_with  # a smaller one where memory ran out
            while canvas.done and not self._ended:
                picture = canvas.done.pop(0)
                with self._stages.turn:
                    if self._stages.plan is not plan:  # the networks were used for something else meanwhile
                        self._stages.follow(plan, job)
                    image = self._decode(picture, job, start)
                    plan = self._stages.ended_with
                if not picture.stopped:
                    yield picture.index, image

    def _denoise(
        self, canvas: Canvas, queue: "deque[int | Picture]", begin: Callable[[int], Picture], evaluations: int
    ) -> None:
        """Take pictures from the queue, as many as the plan has room for, until all of them are done.

        begin: makes one of its index. evaluations: of each at a time. Called again after memory ran out, it goes on
        from the last step, with as many pictures as there is room for now.
        """
        most = self._stages.plan.batch
        canvas.rows, canvas.most = most * evaluations, most
        queue.extendleft(reversed(canvas.leave(most)))
        while queue and len(canvas.on_way) < most:
            picture = queue.popleft()
            picture = begin(picture) if isinstance(picture, int) else picture
            if not picture.stopped:
                (canvas.done if picture.asked is None else canvas.on_way).append(picture)
        while canvas.on_way and not self._ended:
            canvas.step()
        canvas.leave()

    def _begin(self, alike: dict[int, Settings], start: Start | None, texts: Texts, index: int) -> Picture:
        stages, actual = self._stages, self._stages.actual
        self.settings[index], s = replace(self.pictures[index], **actual), replace(alike[index], **actual)
        sigmas, noise = sigmas_of(s, stages.shift), noise_of(stages, s)
        latents, keep = way_of(start, noise, sigmas, stages.dtype if RULES[s.like].rounds_latents else None)
        guidance, source = partial(guidance_of, s, stages.shift), partial(going_on, s.seed, noise, s.rng)
        focusing = Focusing(s, stages.text, stages.shift)
        picture = Picture(index, s, latents, sigmas, self._tell, guidance, focusing, source, keep)
        picture.controls = self._controls.get(control_of(s), [])
        own = {name: texts[text] for name, text in texts_of(s).items()}
        event = Encoded(settings=s, index=index, texts=own, noise=noise, sigmas=sigmas)
        if start is not None:
            event.init, event.mask = start.latents, start.mask
        self._tell(picture, event)
        return picture

    def _encode_controls(self, pictures: Iterable[Settings], job: Job) -> None:
        """Have the pictures encoded that control these, each once."""
        for s in pictures:
            if s.control and control_of(s) not in self._controls:
                work = partial(controlling, self._stages, s)
                self._controls[control_of(s)] = self._stages.stage("init", job, self._seconds, work)

    def _decode(self, picture: Picture, job: Job, start: Start | None) -> Image.Image:
        latents, s = picture.latents, picture.settings
        assert latents is not None
        pixels = self._stages.stage(
            "decode", job, self._seconds, lambda: self._stages.decode(latents, RULES[s.like].truncates_pixels)
        )
        image = Image.fromarray(pixels[0].numpy())
        image = image if start is None else start.beginning.finish(image, s.mask_edges)
        if s.upscale is None:  # else there is a second pass
            self._tell(picture, Drawn(settings=s, index=picture.index, image=image))
        return image

    def _tell(self, picture: Picture, event: Event) -> None:
        for watcher in self._watchers if not self._ended else ():
            event.tell(watcher)
        picture.stopped |= event.stopped or self._ended
        self._ended |= event.ended

    # ---- memory ----------------------------------------------------------------------------------

    def _plan(self, job: Job) -> tuple[Job, Plan]:
        """The fastest plan for pictures whose texts are encoded: encoders that are not on the device stay away.

        Evaluations by a changed network are for a batch with the others where the plan is none the slower for it, else
        for one of their own.
        """
        fewer = job._replace(changed=0)
        plan = self._stages.plan_for(fewer)
        if job.changed:
            with suppress(SettingsError):
                more = self._stages.plan_for(job)
                if (more.modes, more.kept, more.batch) == (plan.modes, plan.kept, plan.batch):
                    fewer, plan = job, more
        now = self._stages.plan.modes
        away = {name: now[name] for name in of_role(Role.ENCODES_TEXT, now) if now[name] is not Mode.RESIDENT}
        return fewer, replace(plan, modes={**plan.modes, **away})

    def _at_a_time(self, job: Job, pictures: int) -> int:
        """How many to denoise at a time where memory is no matter: as equal batches as can be."""
        tokens = (job.texts + job.changed) * (
            job.rows * job.columns // self._stages.transformer.config.patch_size**2 + job.t5_length
        )
        most = max(1, _TOKENS.get(self._stages.device.type, _TOKENS_ELSEWHERE) // tokens)
        return -(-pictures // -(-pictures // most))
