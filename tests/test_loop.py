"""The one loop: what watchers see and stop, and pictures that come and go between steps."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import relative_error
from sweeps import sampled
from test_samplers import midpoint
from toys import toy_folder

from mmdit.driver import texts as encoding
from mmdit.driver.canvas import Canvas, Picture
from mmdit.driver.focusing import Focusing
from mmdit.driver.loop import OWN, Drawing, kind
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.sampling import guidance_of
from mmdit.driver.settings import Settings, alone
from mmdit.driver.texts import encode
from mmdit.driver.watch import Drawn, Encoded, Stepped, Watcher
from samplers import SOLVERS, shifted_sigmas

DEFAULTS = {"width": 48, "height": 32, "steps": 3, "cfg": 4.5, "t5_length": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("loop"), defaults=DEFAULTS)


@pytest.fixture
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, dtype="fp32", device="cpu")


def traced(pipeline: Pipeline, settings: Settings) -> dict[str, torch.Tensor]:
    trace: dict[str, torch.Tensor] = {}
    pipeline.run(settings, trace)
    return trace


# ---- watchers ------------------------------------------------------------------------------------


def test_what_is_seen_after_each_step(pipeline: Pipeline) -> None:
    """Of every picture: whose it is, the noise level, and tensors that are those of a dump; in the order of steps."""
    seen: list[Stepped] = []
    images = pipeline("a horse", negative="a pig", count=2, seed=5, on_step=seen.append)
    trace = traced(pipeline, replace(pipeline.settings, prompt="a horse", negative="a pig", count=2, seed=5))
    assert len(images) == 2
    for index in range(2):
        own = [event for event in seen if event.index == index]
        assert [event.step.index for event in own] == [0, 1, 2]
        assert [event.last for event in own] == [False, False, True]
        before = trace["noise"][index : index + 1]
        for i, event in enumerate(own):
            assert (event.settings.prompt, event.settings.seed, event.settings.count) == ("a horse", 5 + index, 1)
            assert event.sigma == float(trace["sigmas"][i])
            assert torch.equal(event.velocity[0], trace[f"velocity.{i}"][index])
            assert torch.equal(event.latents[0], trace[f"latents.{i}"][index])
            assert torch.equal(event.denoised, before - trace["sigmas"][i] * event.velocity)
            before = event.latents


class Diary(Watcher):
    """What happens, as lines; at some of them something is done."""

    def __init__(self, at: dict[str, Callable[[Any], object]] | None = None) -> None:
        self.lines: list[str] = []
        self._at = at or {}

    def _write(self, line: str, event: Any) -> None:
        self.lines.append(line)
        self._at.get(line, lambda _: None)(event)

    def encoded(self, event: Encoded) -> None:
        assert set(event.texts) == ({"prompt"} if event.settings.cfg == 1 else {"prompt", "negative"})
        self._write(f"encoded {event.index}", event)

    def step(self, event: Stepped) -> None:
        self._write(f"step {event.step.index} of {event.index}", event)

    def picture(self, event: Drawn) -> None:
        assert event.image.size == (event.settings.width, event.settings.height)
        self._write(f"picture {event.index}", event)


def three(pipeline: Pipeline, **more: Any) -> list[Settings]:
    s = replace(pipeline.settings, prompt="a horse", count=3, **more)
    return alone(pipeline.check(s))


def test_the_events_of_two_pictures(pipeline: Pipeline) -> None:
    diary = Diary()
    for i, _ in Drawing(pipeline, three(pipeline)[:2], [diary]):
        diary.lines.append(f"given {i}")
    steps = [f"step {step} of {i}" for step in range(3) for i in range(2)]
    given = [f"{what} {i}" for i in range(2) for what in ("picture", "given")]
    assert diary.lines == ["encoded 0", "encoded 1", *steps, *given]


@pytest.mark.parametrize("when", sampled(["encoded 1", "step 0 of 1", "step 2 of 1", "picture 1"], 2))
def test_one_picture_is_stopped(pipeline: Pipeline, when: str) -> None:
    """It is not given and asks for nothing more; the others are the pictures that they are alone."""
    expected = {i: np.asarray(pipeline.run(s).images[0], int) for i, s in enumerate(three(pipeline))}
    diary = Diary({when: lambda event: event.stop()})
    found = {i: np.asarray(image, int) for i, image in Drawing(pipeline, three(pipeline), [diary])}
    assert found.keys() == {0, 2}
    assert all(np.abs(found[i] - expected[i]).max() <= 1 for i in found)
    assert not any(line.endswith(" 1") for line in diary.lines[diary.lines.index(when) + 1 :])


@pytest.mark.parametrize(("when", "given"), [("encoded 1", []), ("step 1 of 0", []), ("picture 1", [0])])
def test_all_are_stopped(pipeline: Pipeline, when: str, given: list[int]) -> None:
    """At once, without an error; what was given before stays given, and the pipeline can be used."""
    diary = Diary({when: lambda event: event.stop_all()})
    pictures = [*three(pipeline), *three(pipeline, width=64)]
    assert [i for i, _ in Drawing(pipeline, pictures, [diary])] == given
    after = diary.lines[diary.lines.index(when) + 1 :]
    assert not any(line.startswith("picture") or "step 2" in line for line in after)
    assert len(pipeline("a horse")) == 1


def test_after_the_end_nothing_is_encoded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list in parts, whose texts are too many to keep."""
    monkeypatch.setattr(encoding, "_KEPT_AT_MOST", 1)
    asked: list[list[str]] = []
    real = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda texts, n: asked.append(texts) or real(texts, n))
    pictures = [pipeline.check(replace(pipeline.settings, prompt=text, cfg=1)) for text in ("a horse", "a bear")]
    assert list(Drawing(pipeline, pictures, [Diary({"step 0 of 0": lambda event: event.stop_all()})])) == []
    assert asked == [["a horse"]]


def test_what_a_watcher_raises_ends_it(pipeline: Pipeline) -> None:
    def fail(_: Stepped) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipeline("a horse", on_step=fail)
    assert len(list(pipeline.draw_many(["a horse"]))) == 1
    with pytest.raises(KeyError, match="mine"):
        list(pipeline.draw_many(["a horse"], on_step=fail))


# ---- what may be drawn together ------------------------------------------------------------------


def test_all_settings_but_a_pictures_own_have_to_agree() -> None:
    """Whatever is added to Settings: a setting that nobody thought of keeps pictures apart."""
    plain = Settings().resolved({})
    for field in fields(Settings):
        other = replace(plain, **{field.name: "another"} if field.name != "lora" else {"lora": ("another",)})
        assert (kind(other) == kind(plain)) == (field.name in OWN), field.name


def test_each_is_drawn_by_its_own_settings(pipeline: Pipeline) -> None:
    """A list of pictures that differ in one setting each, against each alone: latents at the end."""
    rows = [{}, {"steps": 4}, {"cfg": 2.0}, {"cfg": 1}, {"cfg_interval": "0.5:0.9"}, {"attention": "math"}]
    rows += [{"width": 64}, {"t5_length": 30}, {"negative": "a pig"}, {"seed": 3}]
    pictures = [pipeline.check(replace(pipeline.settings, prompt="a horse", **row)) for row in rows]
    asked: list[str] = []
    predict = pipeline.predict
    pipeline.predict = lambda x, r, by, *more: asked.append(by) or predict(x, r, by, *more)  # type: ignore
    ends: dict[int, torch.Tensor] = {}

    class Ends(Watcher):
        def step(self, event: Stepped) -> None:
            ends[event.index] = event.latents

    assert sorted(i for i, _ in Drawing(pipeline, pictures, [Ends()])) == list(range(len(rows)))
    assert set(asked) == {"auto", "math"}
    for i, s in enumerate(pictures):
        expected = traced(pipeline, s)[f"latents.{(s.steps or 0) - 1}"]
        assert relative_error(ends[i], expected) <= 1e-5, rows[i]
    different = [(i, j) for i in ends for j in ends if i < j and ends[i].shape == ends[j].shape]
    for i, j in different:
        same = {i, j} == {0, 5}  # math computes what auto does
        assert (relative_error(ends[i], ends[j]) <= 1e-5) == same, (rows[i], rows[j])


# ---- between steps -------------------------------------------------------------------------------


def pictures_of(pipeline: Pipeline, rows: list[dict[str, Any]]) -> tuple[list[Picture], Canvas]:
    every = [pipeline.check(replace(pipeline.settings, **{"prompt": "a horse", **row})) for row in rows]
    with pipeline.turn:
        texts = encode(pipeline, every, 0, {})
    made = []
    for i, s in enumerate(every):
        assert s.width and s.height and s.steps
        noise, sigmas = pipeline.noise(s.width, s.height, [s.seed]), shifted_sigmas(s.steps, pipeline.shift)
        made.append(
            Picture(
                i,
                s,
                noise,
                sigmas,
                lambda *_: None,
                partial(guidance_of, s, 3.0),
                Focusing(s, pipeline.text, 3.0),
                lambda: torch.randn_like,
            )
        )
    return made, Canvas(pipeline, texts)


ROWS: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 3, "cfg": 2.0, "seed": 1},
    {"steps": 4, "cfg": 1, "prompt": "a bear", "seed": 2},
    {"steps": 6, "cfg_interval": "0.3:0.8", "negative": "a pig", "seed": 3},
]


@pytest.mark.parametrize("when", sampled([[2, 0, 2, 1], [0, 1, 2, 3], [0, 0, 0, 0]], 3))
def test_pictures_join_and_leave_between_steps(pipeline: Pipeline, when: list[int]) -> None:
    """Each at its own noise level, with its own guidance and texts; one evaluation answers all; each as it is alone."""
    pictures, canvas = pictures_of(pipeline, ROWS)
    sizes: list[int] = []
    hook = pipeline.transformer.x_embedder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    steps, together = 0, 0
    while len(canvas.done) < len(pictures):
        canvas.on_way += [picture for picture, start in zip(pictures, when) if start == steps]
        together = max(together, len(canvas.on_way))
        canvas.step()
        steps += 1
    hook.remove()
    assert len(sizes) == steps == max(start + row["steps"] for start, row in zip(when, ROWS))
    assert together == max(sum(s <= t < s + r["steps"] for s, r in zip(when, ROWS)) for t in range(steps))
    for picture in pictures:
        expected = traced(pipeline, picture.settings)[f"latents.{(picture.settings.steps or 0) - 1}"]
        assert picture.latents is not None
        assert relative_error(picture.latents, expected) <= 1e-5, picture.index


def test_pictures_that_left_come_back(pipeline: Pipeline) -> None:
    """After two steps all but the first are let go; they go on when it is done."""
    pictures, canvas = pictures_of(pipeline, ROWS)
    canvas.on_way = list(pictures)
    canvas.step()
    canvas.step()
    gone = canvas.leave(1)
    assert (canvas.on_way, gone) == (pictures[:1], pictures[1:])
    while canvas.on_way:
        canvas.step()
    assert canvas.done == pictures[:1]
    canvas.on_way = gone
    while canvas.on_way:
        canvas.step()
    for picture in pictures:
        expected = traced(pipeline, picture.settings)[f"latents.{(picture.settings.steps or 0) - 1}"]
        assert picture.latents is not None
        assert relative_error(picture.latents, expected) <= 1e-5, picture.index


@pytest.mark.parametrize("after", [0, 1, 2])
def test_memory_that_runs_out_costs_no_steps(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The step that failed is taken again, by a plan with fewer pictures; those left out go on where they were."""
    wanted = three(pipeline)
    expected = [np.asarray(pipeline.run(s).images[0], int) for s in wanted]
    flow, calls = pipeline.transformer.flow, []

    def scarce(*args: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        if len(calls) == after + 1:
            raise torch.OutOfMemoryError
        return flow(*args)

    monkeypatch.setattr(pipeline.transformer, "flow", scarce)
    monkeypatch.setattr(pipeline.planner, "smaller", lambda _, plan, __: replace(plan, batch=1))
    diary = Diary()
    with pytest.warns(UserWarning, match=r"^denoise: memory ran out; trying again with less: "):
        found = dict(Drawing(pipeline, wanted, [diary]))
    assert all(np.abs(np.asarray(found[i], int) - expected[i]).max() <= 1 for i in range(3))
    assert calls == [6] * (after + 1) + [2] * 3 * (3 - after)
    assert sorted(line for line in diary.lines if line.startswith("step")) == sorted(
        f"step {step} of {i}" for i in range(3) for step in range(3)
    )


def test_a_picture_whose_watcher_runs_out_of_memory_begins_anew(pipeline: Pipeline) -> None:
    """The error came in the middle of its own arithmetic: what it was on its way through is gone."""
    expected = [np.asarray(pipeline.run(s).images[0], int) for s in three(pipeline)]
    failed: list[int] = []

    class Scarce(Watcher):
        def step(self, event: Stepped) -> None:
            if (event.index, event.step.index) == (1, 1) and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError

    pipeline.planner.smaller = lambda _, plan, __: plan  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"^denoise: memory ran out"):
        found = dict(Drawing(pipeline, three(pipeline), [Scarce()]))
    assert all(np.abs(np.asarray(found[i], int) - expected[i]).max() <= 1 for i in range(3))


def test_levels_between_the_steps_are_prepared_with_the_others(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that asks at middle levels and says so: one pass over the adaLN layers, against the method by hand."""
    monkeypatch.setitem(SOLVERS, "euler", midpoint)
    passes: list[int] = []
    layer = pipeline.transformer.joint_blocks[0].x_block.adaLN_modulation
    hook = layer.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    trace = traced(pipeline, replace(pipeline.settings, prompt="a horse"))
    hook.remove()
    assert passes == [2 * 6]  # both texts at six levels
    velocity = pipeline.velocity(pipeline.encode(["a horse"], 20), pipeline.encode([""], 20), 4.5)
    x = trace["noise"]
    with torch.no_grad():
        for sigma, sigma_next in pairwise(trace["sigmas"]):
            half = (sigma + sigma_next) / 2
            x = x + (sigma_next - sigma) * velocity(x + (half - sigma) * velocity(x, sigma), half)
    assert relative_error(trace["latents.2"], x) <= 1e-5


# ---- pictures that join ------------------------------------------------------------------------------


class Door:
    """Pictures that come at given steps of the drawing; each is let in when it is asked for."""

    def __init__(self, at: dict[str, list[Settings]], diary: Diary) -> None:
        self._at, self._diary, self._here = at, diary, list[Settings]()

    def _look(self) -> None:
        for line in [line for line in self._at if line in self._diary.lines]:
            self._here += self._at.pop(line)

    def waiting(self, kind_: Settings) -> bool:
        self._look()
        return any(kind(s) == kind_ for s in self._here)

    def take(self, kind_: Settings, most: int) -> list[Settings]:
        self._look()
        taken = [s for s in self._here if kind(s) == kind_][:most]
        for s in taken:
            self._here.remove(s)
        return taken


def of(pipeline: Pipeline, prompt: str, seed: int, **more: Any) -> Settings:
    return pipeline.check(pipeline.asked({"prompt": prompt, "seed": seed, **more}))


@pytest.mark.parametrize("streamed", [False, True])
def test_pictures_join_between_two_steps(pipeline: Pipeline, streamed: bool) -> None:
    """With texts, subjects and a seed of their own; each is what it is alone, and leaves when it is done."""
    if streamed:
        ladder = pipeline.planner.ladder()
        pipeline.planner.ladder = lambda: ladder[-1:]  # pyright: ignore[reportAttributeAccessIssue]
    first = [of(pipeline, "a horse", 1), of(pipeline, "a bear", 2)]
    later = [of(pipeline, "a horse and a bear", 3, focus="horse; bear"), of(pipeline, "a fox", 4)]
    other, last = of(pipeline, "a cow", 5, cfg=2.0), of(pipeline, "a goat", 6)
    diary = Diary()
    comes = {"step 0 of 0": later[:1], "step 1 of 0": [*later[1:], other], "step 2 of 2": [last]}
    door = Door(comes, diary)
    drawn: dict[int, np.ndarray] = {}
    drawing = Drawing(pipeline, first, [diary], arrivals=door)
    for i, image in drawing:
        drawn[i] = np.asarray(image)
        diary.lines.append(f"given {i}")
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    assert [s.prompt for s in drawing.pictures] == ["a horse", "a bear", "a horse and a bear", "a fox", "a goat"]
    for i, s in enumerate(drawing.pictures):
        alone_ = np.asarray(pipeline.run(s).images[0])
        assert np.abs(drawn[i].astype(int) - alone_.astype(int)).max() <= 1
    at = diary.lines.index
    assert at("step 0 of 0") < at("step 0 of 2") < at("step 2 of 0")  # between two steps of the first
    assert at("given 0") < at("step 2 of 2") < at("step 0 of 4")  # which did not wait for it
    assert door.waiting(kind(other))


def test_who_joined_is_drawn_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the texts of those that there were are encoded one by one."""
    monkeypatch.setattr(encoding, "_KEPT_AT_MOST", 1)
    diary = Diary()
    door = Door({"step 0 of 0": [of(pipeline, "a cow", 3)]}, diary)
    drawing = Drawing(pipeline, [of(pipeline, "a horse", 1), of(pipeline, "a bear", 2)], [diary], arrivals=door)
    assert sorted(i for i, _ in drawing) == [0, 1, 2]


def test_one_with_gradients_among_others_is_planned_for(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_for, jobs = pipeline.plan_for, list[Any]()
    monkeypatch.setattr(pipeline, "plan_for", lambda job: [jobs.append(job), plan_for(job)][1])
    for some in ([{}, {"focus": "horse; bear"}], [{}, {}]):
        jobs.clear()
        pictures = [of(pipeline, "a horse and a bear", i, **more) for i, more in enumerate(some)]
        assert len(list(Drawing(pipeline, pictures))) == 2
        assert jobs[-1].count == 2 and jobs[-1].steep == bool(some[1])
