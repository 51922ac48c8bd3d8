"""A LoRA adapter that keeps subjects apart, trained by adjoint matching: FOCUS (Bill et al. 2025, arXiv 2510.02315).

An iteration draws trajectories of one prompt, without guidance, sees at every step what it costs that the subjects
mix, and moves the velocity towards the adjoint. Both networks of the method are one model, with adapters on and off.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.common.command import give, say
from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked
from mmdit.common.paths import user_path
from mmdit.driver.focusing import FOCUS, found_in, pieces
from mmdit.driver.loading import load_parts
from mmdit.driver.output import engine, save_dump
from mmdit.driver.pipeline import USER_ERRORS, Pipeline
from mmdit.driver.prompts import Line, from_json, read_lines, told_at
from mmdit.driver.sampling import sigmas_of
from mmdit.driver.settings import Settings
from mmdit.driver.texts import encode, texts_of
from mmdit.finetune import adjoint
from mmdit.finetune.lora import JOINT_ATTENTION, Lora, taken, targets
from mmdit.finetune.options import FocusTuning
from mmdit.finetune.state import Files, Log, picked, read, save, seeded, undivided
from mmdit.maps import Look
from mmdit.prepared import Prepared, Row
from mmdit.recompute import checkpointed
from samplers.focus import COSTS
from text_encoders import Conditioning

T = TypeVar("T")

_BETAS = (0.95, 0.999)  # of Adam, as FOCUS's authors have them
_LONGEST, _HORIZON = 2.0, 10  # of a gradient, relative to the mean of so many before
_WATCHED = 4  # of the prompts, where none are held out


class Lesson(NamedTuple):
    """A prompt to learn from."""

    settings: Settings  # all filled in
    groups: tuple[tuple[int, ...], ...]  # of each subject, the places of its words in the context
    text: Conditioning


def read_lessons(name: str, path: str, base: Settings) -> list[Line]:
    """The lines of a file of prompts and their subjects; SettingsError, which names the option, file and line."""
    lines = []
    for number, text in read_lines(user_path(name, path)).items():
        line = Line(f"{path}: line {number}", base)
        with told_at(line):
            given = from_json(text)
            if given.keys() != {"prompt", "focus"} or not all(isinstance(value, str) for value in given.values()):
                raise SettingsError('expected {"prompt": "a horse and a bear", "focus": "horse; bear"}, and no more')
            settings = replace(base, **given)
            settings.resolved({})
            lines.append(line._replace(settings=settings))
    if not lines:
        raise SettingsError(f"{name}: {path}: there is no prompt in it")
    return lines


def settings_of(options: FocusTuning) -> Settings:
    """What the options say of the model and its pictures, as settings without a prompt."""
    known, other = {f.name for f in fields(Settings)}, ("out", "prompts", "seed", "weights")
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in known and f.name not in other}
    given.pop("focus_loss")
    return Settings(**given, cfg=1.0, count=options.trajectories)


def run(options: FocusTuning) -> None:
    """Train, or go on; SettingsError for what cannot be done, before anything is loaded where it shows."""
    options.check()
    files = Files(user_path("out", options.out))
    files.check()
    base = settings_of(options)
    lines = read_lessons("prompts", options.prompts, base)
    held = lines[:_WATCHED] if options.held_out is None else read_lessons("held_out", options.held_out, base)
    try:
        Focus(options, files, lines, held).train()
    except USER_ERRORS as error:
        raise SettingsError(str(error)) from error


class Focus:
    """A run: a model, its adapters, what it learns from, and how far it is."""

    def __init__(self, options: FocusTuning, files: Files, lines: Sequence[Line], held: Sequence[Line]) -> None:
        self.options, self.files = options, files
        parts = load_parts(lines[0].settings)  # no weights yet
        if parts.dtype == torch.float16:
            raise SettingsError("dtype fp16 is too narrow for gradients: expected --dtype bf16 or --dtype fp32")
        every: list[Settings] = []
        for line in (*lines, *held):
            with told_at(line):
                every.append(parts.check(replace(line.settings, focus_loss=options.focus_loss)))
        self.told = self._told(every[: len(lines)], parts.weights)
        state = read(files.run, self.told)
        adapted = targets(parts.networks["transformer"].module, JOINT_ATTENTION)
        plain = replace(settings_of(options), cfg=None, count=1)  # pictures to watch it by are drawn as ever
        self.pipe = Pipeline.from_settings(plain, parts)
        lessons = self._lessons(every)
        self.lessons, self.held = lessons[: len(lines)], lessons[len(lines) :]
        self.levels = sigmas_of(every[0], self.pipe.shift).tolist()
        self.steps = adjoint.steps_of(self.levels)
        self.job = self.pipe.job(every[0])
        transformer, device = self.pipe.transformer, self.pipe.device
        self.pipe.planner.expect(taken(transformer, adapted, options.rank))
        self.plan = self.pipe.plan_for(self.job)
        with self.pipe.turn:
            self.pipe.follow(self.plan, self.job)
        self.lora = Lora(transformer, adapted, options.rank, options.strength, device, options.seed)
        self.optimizer = torch.optim.Adam(self.lora.parameters(), lr=options.rate, betas=_BETAS)
        self.iteration, self.at_once, self.usual = 0, self.plan.batch, 0.0  # usual: length of a gradient
        if state is not None:
            self.lora.load(state["lora"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.at_once, self.usual = state["iteration"], state["at_once"], state["usual"]
        self.saved = self.iteration
        self.log = Log(files.log, [] if state is None else state["lines"])

    def _lessons(self, every: Sequence[Settings]) -> list[Lesson]:
        """With the words of their subjects found, which it says, and their texts encoded."""
        found = [found_in(s, self.pipe.text) for s in every]
        for line in dict.fromkeys(line for one in found for line in pieces(one)):
            say(line)
        groups = [tuple(subject.columns for subject in one[FOCUS]) for one in found]
        texts = encode(self.pipe, every, 0, {})
        encoded = [next(texts[text] for text in texts_of(s).values()) for s in every]
        return [Lesson(*each) for each in zip(every, groups, encoded)]

    def _told(self, lessons: Sequence[Settings], weights: str) -> dict[str, Any]:
        """What makes the run what it is; files by what is in them."""
        options, first = self.options, lessons[0]
        apart = {*marked(FocusTuning, Mark.NOT_SEEN), *marked(FocusTuning, Mark.PATH), "weights"}
        told = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in apart}
        told |= {name: getattr(first, name) for name in ("width", "height", "steps", "t5_length", "dtype")}
        lines = json.dumps([(s.prompt, s.focus) for s in lessons])
        return {**told, "weights": weights, "prompts": hashlib.sha256(lines.encode()).hexdigest()}

    # ---- the run ---------------------------------------------------------------------------------

    def train(self) -> None:
        """To the last iteration; what is done is saved where it is interrupted."""
        options = self.options
        try:
            with tqdm(total=options.iterations, initial=self.iteration, desc="train", disable=None) as bar:
                while True:
                    if self._watching():
                        self.watch()
                    if self.iteration >= options.iterations:
                        break
                    line = self.update()
                    bar.set_postfix({name: f"{line[name]:.4g}" for name in ("loss", "cost")})
                    bar.update()
                    if self.iteration % options.save_every == 0:
                        self.save()
        except KeyboardInterrupt:
            if self.iteration > self.saved:
                self.save()
            raise
        finally:
            self.pipe.let_go()
        if self.iteration > self.saved or not self.files.out.exists():
            self.save()
        give(self.files.out)

    def _watching(self) -> bool:
        """Whether it is time to look at the held-out prompts, and that was not done yet."""
        every, now = self.options.watch_every, self.iteration
        if not every or (now % every and now < self.options.iterations):
            return False
        return not any(line["iteration"] == now and "held_out" in line for line in self.log.lines)

    def update(self) -> dict[str, Any]:
        """One iteration; returns its line of the log."""
        start, i = time.perf_counter(), self.iteration
        lesson = self.lessons[picked(len(self.lessons), self.options.seed, i)]
        found = self._staged(partial(self.gradients, lesson, i))
        length = torch.stack([p.grad.norm() for p in self.lora.parameters() if p.grad is not None]).norm()
        if not torch.isfinite(length):
            raise self.pipe.not_finite(f"the gradient of iteration {i + 1}")
        line = {"iteration": i + 1, "prompt": lesson.settings.prompt, **found, "gradient": float(length)}
        with undivided():
            self._clip(float(length))
            self.optimizer.step()
            self.iteration += 1
            self.log({**line, "seconds": round(time.perf_counter() - start, 3)})
        return line

    def _clip(self, length: float) -> None:
        """Shorten a gradient that is more than twice as long as usual: adjoints are a few times as long now and then.

        Adam, whose steps are relative to the squares of a thousand gradients, would hardly move after one of them.
        """
        self.usual = self.usual or length
        most = _LONGEST * self.usual
        for p in self.lora.parameters() if length > most else ():
            if p.grad is not None:
                p.grad *= most / length
        self.usual += (min(length, most) - self.usual) / _HORIZON

    def save(self) -> None:
        """The adapter, and with it the run."""
        with undivided():
            metadata = {"mmdit.finetune": json.dumps({**self.told, "iterations": self.iteration, "version": engine()})}
            save_dump(partial(self.lora.write, metadata=metadata), self.files.out)
            state = {"lora": self.lora.state(), "optimizer": self.optimizer.state_dict(), "told": self.told}
            own = {"iteration": self.iteration, "at_once": self.at_once, "usual": self.usual, "lines": self.log.lines}
            save(self.files.run, {**state, **own})
            self.saved = self.iteration

    def _staged(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by the run's plan, or by the next smaller one where memory runs out."""
        pipe = self.pipe
        with pipe.turn:
            if pipe.plan is not self.plan:  # pictures were drawn meanwhile
                pipe.follow(self.plan, self.job)
            found = pipe.stage("denoise", self.job, {}, work)
            self.plan = pipe.ended_with
        return found

    # ---- an iteration ----------------------------------------------------------------------------

    def gradients(self, lesson: Lesson, i: int) -> dict[str, Any]:
        """Leave the gradients of the loss in the adapters; returns what the iteration found."""
        options, steps, count, most = self.options, self.steps, self.options.trajectories, self._most()
        self.optimizer.zero_grad()
        chosen = torch.randperm(len(steps) - 1, generator=seeded(options.seed, "steps", i))[: options.at_steps]
        order = sorted(chosen.tolist())
        prepared, costs, loss = self._prepared(lesson), list[Tensor](), 0.0
        for own in parted(range(count), most):
            sources = [seeded(options.seed, "noise", i, b) for b in own]
            look, noise = Looking(self, lesson, prepared, len(own)), partial(self._noise, lesson, sources)
            way = adjoint.drawn(steps, noise(), look.slopes, noise)
            costs.append(way.costs)
            with self.lora.off():
                pulled = adjoint.adjoints(steps, way, partial(self._pull, prepared), options.scale)
            points = [(k, way.points[k][b], pulled[k][b]) for k in order for b in range(len(own))]
            for some in parted(points, most):
                loss += self._descend(prepared, some, 1 / (len(order) * count))
        every = torch.cat(costs, dim=1).cpu()  # (K, B)
        mean = float((torch.tensor([step.height for step in steps]) @ every).mean())
        return {"loss": loss, "cost": mean, "first": float(every[0].mean()), "last": float(every[-1].mean())}

    def _most(self) -> int:
        """Rows of a batch: as when the run began, or as many as there is room for after memory ran out."""
        return min(self.at_once, self.pipe.plan.batch)

    def _noise(self, lesson: Lesson, sources: Sequence[torch.Generator]) -> Tensor:
        """Of each source, `(B, C, h, w)`."""
        s, cell = lesson.settings, self.pipe.vae.config.downscale
        assert s.width and s.height
        shape = (self.pipe.transformer.config.in_channels, s.height // cell, s.width // cell)
        return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(self.pipe.device)

    @torch.no_grad()
    def _prepared(self, lesson: Lesson) -> Prepared:
        return self.pipe.prepare([lesson.text], self.levels[:-1])

    def _velocity(self, prepared: Prepared, x: Tensor, levels: Sequence[float]) -> Tensor:
        """dX/dt, which is minus what the network predicts, of latents at these noise levels."""
        rows = [Row(prepared, level, 0) for level in levels]
        return -self.pipe.predict(x, rows, self.options.attention)

    def _pull(self, prepared: Prepared, k: int, x: Tensor, a: Tensor) -> Tensor:
        """(dv/dX)^T a at step k."""
        with torch.enable_grad(), checkpointed(self.pipe.transformer):
            leaf = x.detach().requires_grad_()
            velocity = self._velocity(prepared, leaf, [self.levels[k]] * len(x))
            return torch.autograd.grad(velocity, leaf, a)[0].float()

    def _descend(self, prepared: Prepared, points: Sequence[tuple[int, Tensor, Tensor]], share: float) -> float:
        """Add the gradients of the loss at some points, each with its step and adjoint; returns that part of it.

        share: of a point in the whole. Both velocities are computed with a graph to the latents, so by the same
        kernels: nothing but the adapters tells them apart.
        """
        x, levels = torch.stack([x for _, x, _ in points]), [self.levels[k] for k, _, _ in points]
        with torch.enable_grad(), checkpointed(self.pipe.transformer):
            with self.lora.off():
                base = self._velocity(prepared, x.detach().requires_grad_(), levels).detach()
            learning = self._velocity(prepared, x.detach().requires_grad_(), levels)
            pairs = zip(points, learning, base)
            each = [adjoint.mismatch(self.steps[k], one, other, a).mean() for (k, _, a), one, other in pairs]
            loss = share * torch.stack(each).sum()
            loss.backward()
        return float(loss.detach())

    # ---- watching --------------------------------------------------------------------------------

    def watch(self) -> None:
        """A line of the log with what held-out prompts cost, with and without the adapter; and a picture of each."""
        cost = self._staged(self._watched)
        base = next((line["held_out_base"] for line in self.log.lines if "held_out_base" in line), None)
        if base is None:
            with self.lora.off():
                base = self._staged(self._watched)
        for n, lesson in enumerate(self.held[:_WATCHED]):
            s = lesson.settings
            (image,) = self.pipe(s.prompt, seed=self.options.seed, width=s.width, height=s.height)
            path = self.files.pictures / f"{self.iteration:06d}-{n + 1}.png"
            save_dump(partial(image.save, format="PNG"), path)
        self.log({"iteration": self.iteration, "held_out": cost, "held_out_base": base})
        say(f"after {self.iteration}: cost {cost:.4f} on held-out prompts, {base:.4f} without the adapter")

    @torch.no_grad()
    def _watched(self) -> float:
        """What pictures of held-out prompts cost on their way, without guidance and noise on it: the mean over time."""
        found = list[float]()
        for n, lesson in enumerate(self.held):
            prepared = self._prepared(lesson)
            for own in parted(range(self.options.trajectories), self._most()):
                look = Looking(self, lesson, prepared, len(own))
                x = self._noise(lesson, [seeded(self.options.seed, "held out", n, b) for b in own])
                total = torch.zeros(len(own), device=x.device)
                for k, step in enumerate(self.steps):
                    velocity, costs = look.costs(k, x)
                    total += step.height * costs
                    x = x + step.height * velocity
                found += total.tolist()
        return sum(found) / len(found)


def parted(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """So many of them at a time."""
    for first in range(0, len(items), most):
        yield items[first : first + most]


class Looking:
    """What a run sees of trajectories on their way; their costs may remember the step before."""

    def __init__(self, run: Focus, lesson: Lesson, prepared: Prepared, count: int) -> None:
        places = iter(range(sum(map(len, lesson.groups))))
        groups = tuple(tuple(next(places) for _ in group) for group in lesson.groups)
        self._run, self._prepared = run, prepared
        self._tokens = tuple(column for group in lesson.groups for column in group)
        self._costs = [COSTS[run.options.focus_loss](groups)] * count

    def slopes(self, k: int, x: Tensor) -> adjoint.Seen:
        """Velocity, costs and their gradients where step k begins."""
        velocity, seen = self._look(k, x, [Look(self._tokens, cost) for cost in self._costs])
        costs, slopes = zip(*((one.cost, one.gradient) for one in seen))
        return adjoint.Seen(velocity, torch.stack(costs), torch.cat(slopes))

    def costs(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and costs alone."""
        now = self._costs
        velocity, seen = self._look(k, x, [Look(self._tokens)] * len(x))
        return velocity, torch.stack([cost(one.maps) for cost, one in zip(now, seen)])

    def _look(self, k: int, x: Tensor, looks: Sequence[Look]) -> tuple[Tensor, list[Any]]:
        rows = [Row(self._prepared, self._run.levels[k], 0, None, look) for look in looks]
        velocity, seen = self._run.pipe.look(x, rows, self._run.options.attention)
        self._costs = [cost.next(one.maps) for cost, one in zip(self._costs, seen) if one is not None]
        return -velocity, list(seen)
