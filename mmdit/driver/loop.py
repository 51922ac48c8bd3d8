"""The one loop: any number of pictures, step by step; each leaves it as soon as it is done."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import Protocol

from PIL import Image

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked
from mmdit.control.options import ControlOptions
from mmdit.driver.canvas import Canvas, Picture
from mmdit.driver.controlling import Controlling, controlling
from mmdit.driver.focusing import Focusing, steep
from mmdit.driver.likeness import RULES
from mmdit.driver.pictures import enlarged
from mmdit.driver.sampling import changed, guidance_of, sigmas_of
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.driver.starting import Start, noise_of, started, way_of
from mmdit.driver.texts import Texts, encode, parts, texts_of
from mmdit.driver.watch import Drawn, Encoded, Event, Finite, Progress, Watcher
from mmdit.images.options import steps_of
from mmdit.memory.plan import Job, Plan
from mmdit.memory.residency import Mode, Role, of_role
from samplers.noise import going_on

_TOKENS = {"cuda": 2**16}  # denoised at a time: more are no faster, and make the first picture late
_TOKENS_ELSEWHERE = 2**13
_MOST = 64  # pictures at a time where others join

# What may differ between pictures that are drawn together: each row of a batch has its own. All else, whatever is
# added to Settings, has to agree.
OWN = marked(Settings, Mark.OWN)


def kind(s: Settings) -> Settings:
    """What pictures have in common that may be drawn together; hashable."""
    return replace(s, **{name: getattr(Settings, name) for name in OWN})


def control_of(s: Settings) -> object:
    """All that tells how a picture is controlled; hashable."""
    return tuple(getattr(s, f.name) for f in fields(ControlOptions)), s.width, s.height


class Arrivals(Protocol):
    """Pictures that come while others are drawn; asked between two steps, in the thread that draws."""

    def waiting(self, kind: Settings, /) -> bool:
        """Whether there are pictures of this kind."""
        raise NotImplementedError

    def take(self, kind: Settings, most: int, /) -> list[Settings]:
        """So many of them at most; their indices follow those of the pictures that there are."""
        raise NotImplementedError


class Drawing:
    """Pictures to be drawn: iterating over it draws, and gives each with its index as soon as it is done."""

    def __init__(
        self,
        stages: Stages,
        pictures: Sequence[Settings],
        watchers: Sequence[Watcher] = (),
        seconds: dict[str, float] | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        """pictures: each with count 1, and as `Stages.check` returns it. seconds: of each stage, added up here.

        arrivals: others that join, as soon as there is room between two steps, those of their kind; then pictures are
        decoded as soon as they are denoised, not when all are that were denoised with them.

        Raises SettingsError where one of them does not fit into the memory.
        """
        self._stages, self.pictures, self._arrivals = stages, [*pictures], arrivals
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
                for part, waiting in parts(stages, [*self.pictures]):
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
        """One pass of pictures, by their indices, which are of one kind; others may join."""
        first = next(iter(alike.values()))
        canvas, queue = Canvas(self._stages, texts), deque[int | Picture](alike)
        joins = self._arrivals
        with self._stages.turn:
            job, plan = self._plan(self._job(alike, waiting, joins))
        start: Start | None = None
        while queue and not self._ended:
            with self._stages.turn:
                self._stages.follow(plan, job)
                if first.init is not None and start is None:
                    start = self._stages.stage("init", job, self._seconds, partial(started, self._stages, first))
                self._encode_controls(alike.values(), job)
                begin = partial(self._begin, alike, start, texts)
                pause = partial(self._pauses, canvas, kind(first), joins)
                work = partial(self._denoise, canvas, queue, begin, job.texts + job.changed, pause)
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
            new = [] if joins is None or self._ended else joins.take(kind(first), plan.batch - len(queue))
            if new:
                with self._stages.turn:
                    texts |= encode(self._stages, new, waiting, self._seconds)
                    for s in new:
                        alike[len(self.pictures)] = s
                        queue.append(len(self.pictures))
                        self.pictures.append(s)
                    job, plan = self._plan(self._job(alike, waiting, joins))

    def _job(self, alike: Mapping[int, Settings], waiting: int, joins: Arrivals | None) -> Job:
        """What one pass of pictures of one kind asks of the memory; where others join, of as many as can be."""
        first = next(iter(alike.values()))
        apart = joins is not None or len({tuple(texts_of(s).values()) for s in alike.values()}) > 1
        job = self._stages.job(first, waiting=waiting, apart=apart, changed=changed(first))
        job = job._replace(steep=any(map(steep, alike.values())))
        return job._replace(count=self._at_a_time(job, len(alike) if joins is None else _MOST))

    def _pauses(self, canvas: Canvas, kind: Settings, joins: Arrivals | None) -> bool:
        """Whether there is something to be done before the next step: a picture to be decoded, or others join."""
        if joins is None:
            return False
        return bool(canvas.done) or (len(canvas.on_way) < self._stages.plan.batch and joins.waiting(kind))

    def _denoise(
        self,
        canvas: Canvas,
        queue: "deque[int | Picture]",
        begin: Callable[[int], Picture],
        evaluations: int,
        pause: Callable[[], bool],
    ) -> None:
        """Take pictures from the queue, as many as the plan has room for, until all of them are done, or for a pause.

        begin: makes one of its index. evaluations: of each at a time. Called again after memory ran out, or a pause, it
        goes on from the last step, with as many pictures as there is room for now.
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
            if pause():
                break
        queue.extendleft(reversed(canvas.leave()))

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
        begun = None if start is None else start.beginning
        image = image if begun is None else begun.finish(image, s.mask_edges)
        if s.upscale is None:  # else there is a second pass
            region = None if begun is None else begun.region
            self._tell(picture, Drawn(settings=s, index=picture.index, image=image, region=region))
        return image

    def _tell(self, picture: Picture, event: Event) -> None:
        for watcher in self._watchers if not self._ended else ():
            event.tell(watcher)
        stopped = picture.stopped or event.stopped or self._ended
        picture.stopped, self._ended = self._stages.decided(stopped, self._ended or event.ended)

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
