"""Many pictures: every text is encoded once, and pictures of one kind are denoised together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdit.attention import attention_by
from mmdit.driver.settings import Settings, interval_of
from mmdit.errors import SettingsError
from mmdit.memory.budget import DeviceMemoryError, budget_of
from mmdit.memory.plan import Job, Plan
from mmdit.memory.residency import Mode
from samplers import Step, euler, shifted_sigmas
from text_encoders import Conditioning

if TYPE_CHECKING:
    from mmdit.driver.pipeline import Pipeline

_TEXTS = 64  # encoded at a time: more are no faster
_TOKENS = {"cuda": 2**16}  # denoised at a time: more are no faster, and make the first picture late
_TOKENS_ELSEWHERE = 2**13
_KEPT = 0.1  # of the budget, for texts that are encoded and wait
_KEPT_AT_MOST = 1e9  # bytes

Text = tuple[str, int]  # with the number of T5's tokens
Texts = dict[Text, Conditioning]  # each a batch of 1, on the CPU


class Kind(NamedTuple):
    """What pictures have in common that are denoised together."""

    width: int
    height: int
    steps: int
    cfg: float
    t5_length: int
    memory: str
    cfg_interval: str | None
    attention: str

    @classmethod
    def of(cls, s: Settings) -> Kind:
        assert s.width and s.height and s.steps and s.t5_length and s.cfg is not None
        return cls(s.width, s.height, s.steps, s.cfg, s.t5_length, s.memory, s.cfg_interval, s.attention)


def texts_of(s: Settings) -> list[Text]:
    """What is encoded for a picture: the prompt, and with guidance the negative prompt."""
    length = Kind.of(s).t5_length
    return [(s.prompt, length)] if s.cfg == 1 else [(s.prompt, length), (s.negative, length)]


class Drawing:
    """A list on its way: iterating over it draws, and gives each picture with its index as soon as it is done."""

    def __init__(self, pipe: Pipeline, pictures: Sequence[Settings], seconds: dict[str, float] | None = None) -> None:
        """pictures: each with count 1, and as `Pipeline.check` returns it. seconds: of each stage, added up here.

        Raises SettingsError where one of them does not fit into the memory.
        """
        self.pipe, self.pictures = pipe, pictures
        self.seconds = {} if seconds is None else seconds
        for s in {Kind.of(s): s for s in pictures}.values():
            self.fitting(pipe.job(s), s.memory)

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        steps = sum(Kind.of(s).steps for s in self.pictures)
        with tqdm(total=steps, unit="step", disable=None, leave=False) as self.bar:
            self.done = 0  # pictures
            try:
                for part in self.parts():
                    texts = self.encode([self.pictures[i] for i in part])
                    kinds: dict[Kind, list[int]] = {}
                    for i in part:
                        kinds.setdefault(Kind.of(self.pictures[i]), []).append(i)
                    for alike in kinds.values():
                        yield from self.draw(alike, texts)
            finally:
                self.pipe.residency.use(None)

    def parts(self) -> Iterator[list[int]]:
        """The list in parts whose texts, encoded, are few enough to keep."""
        part: list[int] = []
        texts: dict[Text, int] = {}
        for i, s in enumerate(self.pictures):
            new = {text: self.size(text) for text in texts_of(s) if text not in texts}
            if part and sum((*texts.values(), *new.values())) > self.kept(s.memory):
                yield part
                part, texts = [], {}
                new = {text: self.size(text) for text in texts_of(s)}
            part.append(i)
            texts |= new
        if part:
            yield part

    def size(self, text: Text) -> int:
        """Bytes of a text, encoded."""
        _, t5_length = text
        tokens = self.pipe.text.clip_l.config.max_length + t5_length
        return tokens * self.pipe.text.width * self.pipe.dtype.itemsize

    # ---- memory ----------------------------------------------------------------------------------

    def kept(self, memory: str) -> int:
        """Bytes for texts that are encoded and wait."""
        return int(min(_KEPT * budget_of(memory, self.pipe.device), _KEPT_AT_MOST))

    def fitting(self, job: Job, memory: str) -> tuple[Plan, int]:
        """The fastest plan, and its budget; on a CPU with room for the texts that are kept, if there is any."""
        whole, plan = budget_of(memory, self.pipe.device), self.pipe.planner.plan
        less = whole - (self.kept(memory) if self.pipe.device.type == "cpu" else 0)
        try:
            return plan(job, less), less
        except SettingsError:
            return plan(job, whole), whole

    def plan_for(self, job: Job, memory: str) -> Plan:
        """The fastest plan for pictures whose texts are encoded: encoders that are not on the device stay away."""
        plan, now = self.fitting(job, memory)[0], self.pipe.plan.modes
        encoders = [name for name in now if name not in ("transformer", "vae")]
        away = {name: now[name] for name in encoders if now[name] is not Mode.RESIDENT}
        return replace(plan, modes={**plan.modes, **away})

    def batch(self, job: Job, pictures: int) -> int:
        """How many to denoise at a time where memory is no matter: as equal batches as can be."""
        tokens = job.texts * (job.rows * job.columns // self.pipe.transformer.config.patch_size**2 + job.t5_length)
        most = max(1, _TOKENS.get(self.pipe.device.type, _TOKENS_ELSEWHERE) // tokens)
        return -(-pictures // -(-pictures // most))

    # ---- stages ----------------------------------------------------------------------------------

    def encode(self, pictures: list[Settings]) -> Texts:
        """Each distinct text once, as many at a time as there is room for."""
        lengths: dict[int, list[str]] = {}
        for text, length in dict.fromkeys(text for s in pictures for text in texts_of(s)):
            lengths.setdefault(length, []).append(text)
        largest = max(pictures, key=lambda s: Kind.of(s).width * Kind.of(s).height)
        job = self.pipe.job(replace(largest, t5_length=max(lengths)))
        plan, budget = self.fitting(job, largest.memory)
        most = min(_TEXTS, max(map(len, lengths.values())))

        def work(_: tqdm) -> Texts:
            size, found = next(sizes), {}
            for length, texts in lengths.items():
                for i in range(0, len(texts), size):
                    some = texts[i : i + size]
                    encoded = self.pipe.encode(some, length)
                    context, pooled = encoded.context.cpu(), encoded.pooled.cpu()
                    for k, text in enumerate(some):
                        found[text, length] = Conditioning(context[k : k + 1], pooled[k : k + 1], {})
            return found

        self.tell("encode")
        self.pipe.follow(plan, job)
        texts = self.pipe.planner.texts(job, plan, budget, most) if self.pipe.plan is plan else job.texts
        sizes = iter((texts, job.texts))  # the second for a second try
        try:
            return self.pipe.stage("encode", job, self.seconds, work, self.bar)
        except DeviceMemoryError:
            fewer = next(sizes, None)
            if fewer is None:
                raise
        sizes = iter((fewer, fewer))
        return self.pipe.stage("encode", job, self.seconds, work, self.bar)

    def draw(self, alike: list[int], texts: Texts) -> Iterator[tuple[int, Image.Image]]:
        """The pictures with these indices, which are of one kind."""
        first = self.pictures[alike[0]]
        apart = len({tuple(texts_of(self.pictures[i])) for i in alike}) > 1
        job = self.pipe.job(first)
        job = job._replace(count=self.batch(job, len(alike)), apart=apart)
        plan = self.plan_for(job, first.memory)
        while alike:
            now, alike = alike[: plan.batch], alike[plan.batch :]
            self.pipe.follow(plan, job)
            latents = self.denoise(job, [self.pictures[i] for i in now], texts)
            plan = self.pipe.plan  # a smaller one where memory ran out
            for i, latent in zip(now, latents.split(1)):
                self.tell("draw")
                if self.pipe.plan is not plan:  # the pipeline was used for something else meanwhile
                    self.pipe.follow(plan, job)
                pixels = self.pipe.stage("decode", job, self.seconds, lambda _, z=latent: self.pipe.decode(z), self.bar)
                plan, self.done = self.pipe.plan, self.done + 1
                yield i, Image.fromarray(pixels[0].numpy())

    def denoise(self, job: Job, pictures: list[Settings], texts: Texts) -> Tensor:
        """Latents `(B, C, h, w)` of pictures of one kind."""
        pipe, kind, start = self.pipe, Kind.of(pictures[0]), self.bar.n
        sigmas = shifted_sigmas(kind.steps, pipe.shift)

        @torch.no_grad()
        def work(bar: tqdm) -> Tensor:
            bar.n, ends, check = start, [], pipe.finite_steps(kind.steps)

            def watch(step: Step) -> None:
                check(step)
                bar.update(len(step.x))

            for i in range(0, len(pictures), pipe.plan.batch):
                some = pictures[i : i + pipe.plan.batch]
                cond, *uncond = (together(row, texts) for row in zip(*map(texts_of, some)))
                x = pipe.noise(kind.width, kind.height, [s.seed for s in some]).to(pipe.device)
                known, interval = sigmas[:-1].tolist(), interval_of(kind.cfg_interval)
                velocity = pipe.velocity(cond, *uncond, cfg=kind.cfg, count=len(some), sigmas=known, interval=interval)
                with attention_by(kind.attention):
                    ends.append(euler(velocity, x, sigmas, watch))
                del velocity  # before the next is made: each has a table of its own
            return torch.cat(ends)

        self.tell("draw")
        return pipe.stage("denoise", job, self.seconds, work, self.bar)

    def tell(self, what: str) -> None:
        self.bar.set_description_str(f"{what} ({self.done} of {len(self.pictures)})")


def together(row: Sequence[Text], texts: Texts) -> Conditioning:
    """One batch of texts; of a single one where all are the same."""
    found = [texts[text] for text in (row if len(set(row)) > 1 else row[:1])]
    return Conditioning(torch.cat([t.context for t in found]), torch.cat([t.pooled for t in found]), {})
