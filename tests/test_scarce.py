"""Memory that runs out while weights come to stay: it is tried again with less, once."""

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_memory import PROMPT, RUNGS, SIZE, drawn, equal, full, planner  # noqa: F401
from torch import Tensor
from toys import toy_folder

from mmdit.driver.loading import load_parts
from mmdit.driver.loop import Drawing
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.memory.activations import Activations
from mmdit.memory.budget import DeviceMemoryError
from mmdit.memory.meter import Meter
from mmdit.memory.plan import Job, Plan
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Network, Residency
from weights import Source

JOB = Job(4, 6, 1, 3, 2, 20, context=97)
AGAIN = r"^loading: memory ran out; trying again with less: "
NO_MORE = r"^loading: the device's memory does not suffice; try --quantise int8, --t5 off, a smaller picture, or "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight of it has to be converted."""
    return toy_folder(tmp_path_factory.mktemp("scarce"), dtype="fp16")


@pytest.fixture
def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a model with all the ways of a GPU of being there, the first of which is the plan; no strips, which round."""
    monkeypatch.setattr(Planner, "ladder", lambda _: RUNGS)
    monkeypatch.setattr(Activations, "decoding", lambda *_: (None, 10**6))
    return Settings(prompt=PROMPT, model=str(folder), device="cpu", dtype="bf16", **SIZE)


class Scarce:
    """Memory that runs out at these reads of a tensor, counted from 1, and is clean of the attempt at the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, networks: dict[str, Network], *fails: int) -> None:
        self.networks, self.fails, self.reads = networks, fails, 0
        self.held: list[weakref.ref[Any]] = []
        self.clean: list[bool] = []
        read = Source.__call__
        monkeypatch.setattr(Source, "__call__", lambda source, name: self.read(lambda: read(source, name)))

    def read(self, read: Callable[[], Tensor]) -> Tensor:
        self.reads += 1
        if self.held:
            self.clean.append(self.bare() and all(ref() is None for ref in self.held))
            self.held.clear()
        if self.reads in self.fails:
            large = torch.empty(1000)
            there = [p for n in self.networks.values() for p in n.module.state_dict(keep_vars=True).values()]
            self.held = [weakref.ref(p) for p in (large, *(p for p in there if not p.is_meta))]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read()

    def bare(self) -> bool:
        return all(tensor.is_meta for n in self.networks.values() for tensor in n.module.state_dict().values())


def expected(settings: Settings) -> dict[str, Tensor]:
    return drawn(Pipeline.from_settings(settings))


@pytest.mark.parametrize("fails", [1, 40, 200])
def test_at_loading(settings: Settings, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """In the first network or a later one; the next picture is not planned as what could not be had."""
    undisturbed, parts = expected(settings), load_parts(settings)
    scarce = Scarce(monkeypatch, parts.networks, fails)
    with pytest.warns(UserWarning, match=AGAIN) as warned:
        pipeline = Pipeline.from_settings(settings, parts)
    assert len(warned) == 1
    assert str(warned[0].message).endswith(str(pipeline.plan))
    assert pipeline.plan.modes in RUNGS[1:]
    for _ in range(2):
        assert equal(drawn(pipeline), undisturbed)
    assert scarce.clean == [True]


def test_between_pictures(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline of which nothing stays is to have all stay for its next picture."""
    undisturbed, pipeline = expected(settings), Pipeline.from_settings(settings)
    pipeline.follow(replace(pipeline.plan, modes=RUNGS[-1], kept=0), JOB)
    scarce = Scarce(monkeypatch, pipeline.residency.networks, 100)
    with pytest.warns(UserWarning, match=AGAIN) as warned:
        found = drawn(pipeline)
    assert len(warned) == 1
    assert equal(found, undisturbed)
    assert scarce.clean == [True]
    assert equal(drawn(pipeline), undisturbed)


def test_in_a_list(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures are drawn, by the smaller plan, the texts few at a time."""
    wanted = [{"prompt": text, "seed": i} for i, text in enumerate(("a horse", "a bear", "a pig"))]
    pipeline, sizes = Pipeline.from_settings(settings), []
    undisturbed = {s: np.asarray(image, int) for s, image in pipeline.draw_many(wanted)}
    pipeline.follow(replace(pipeline.plan, modes=RUNGS[-1], kept=0), JOB)
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda texts, n: sizes.append(len(texts)) or encode(texts, n))
    Scarce(monkeypatch, pipeline.residency.networks, 100)
    with pytest.warns(UserWarning, match=AGAIN) as warned:
        found = dict(pipeline.draw_many(wanted))
    assert len(warned) == 1
    assert found.keys() == undisturbed.keys()
    assert all(np.abs(np.asarray(image, int) - undisturbed[s]).max() <= 1 for s, image in found.items())
    assert sizes == [2, 2]
    assert pipeline.plan.modes in RUNGS[1:]


def test_before_a_batch_of_a_list(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the texts are encoded and the transformer is to stay; the plan that is found is kept to."""
    wanted = [{"prompt": text, "seed": i} for i, text in enumerate(("a horse", "a bear", "a pig"))]
    pipeline = Pipeline.from_settings(settings)
    undisturbed = {s: np.asarray(image, int) for s, image in pipeline.draw_many(wanted)}
    asked = [pipeline.check(pipeline.asked(entry)) for entry in wanted]
    drawing, encode, scarce = Drawing(pipeline, asked), pipeline.stage, []

    def stage(name: str, *rest: Any) -> Any:
        done = encode(name, *rest)
        if name == "encode":
            pipeline.follow(replace(pipeline.plan, modes=RUNGS[-1], kept=0), JOB)
            scarce.append(Scarce(monkeypatch, pipeline.residency.networks, 20))
        return done

    monkeypatch.setattr(pipeline, "stage", stage)
    with pytest.warns(UserWarning, match=AGAIN) as warned:
        found = {asked[i]: np.asarray(image, int) for i, image in drawing}
    assert len(warned) == 1
    assert all(np.abs(found[s] - undisturbed[replace(s, **pipeline.actual)]).max() <= 1 for s in asked)
    assert scarce[0].clean == [True]


def test_a_second_time_is_the_users_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, and nothing left on the device, at loading as between pictures; memory that is there again is used."""
    monkeypatch.setattr(Planner, "ladder", lambda _: RUNGS[:2])
    undisturbed, parts = expected(settings), load_parts(settings)
    with monkeypatch.context() as patch:
        scarce = Scarce(patch, parts.networks, 40, 100)
        with pytest.warns(UserWarning, match=AGAIN) as warned, pytest.raises(DeviceMemoryError, match=NO_MORE):
            Pipeline.from_settings(settings, parts)
    assert (len(warned), scarce.reads, scarce.bare()) == (1, 100, True)
    pipeline = Pipeline.from_settings(settings)
    pipeline.follow(replace(pipeline.plan, modes=RUNGS[-1], kept=0), JOB)
    with monkeypatch.context() as patch:
        scarce = Scarce(patch, pipeline.residency.networks, 40, 100)
        with pytest.warns(UserWarning, match=AGAIN) as warned, pytest.raises(DeviceMemoryError, match=NO_MORE):
            drawn(pipeline)
    assert (len(warned), scarce.reads, scarce.bare()) == (1, 100, True)
    assert equal(drawn(pipeline), undisturbed)


def test_a_third_time_is_not_tried(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a smaller plan could always be found."""
    parts, asked = load_parts(settings), []

    def smaller(_: Planner, job: Job, plan: Plan, stage: str) -> Plan:
        asked.append((job, stage))
        return plan

    monkeypatch.setattr(Planner, "smaller", smaller)
    scarce = Scarce(monkeypatch, parts.networks, 1, 2, 3)
    with pytest.warns(UserWarning, match=AGAIN), pytest.raises(DeviceMemoryError, match=NO_MORE):
        Pipeline.from_settings(settings, parts)
    assert (asked, scarce.reads) == ([(JOB, "loading")], 2)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_stage_that_goes_on_goes_by_the_smaller_plan(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Everything stayed; now it comes block by block."""
    undisturbed, pipeline, ways = expected(settings), Pipeline.from_settings(settings), []
    less = replace(pipeline.plan, modes=RUNGS[-1], kept=kept)
    monkeypatch.setattr(Planner, "smaller", lambda *_: less)
    flow, networks = pipeline.transformer.flow, pipeline.residency.networks

    def scarce(*args: Any) -> Tensor:
        ways.append(({name: network.mode for name, network in networks.items()}, networks["transformer"].kept))
        if len(ways) == 2:
            raise torch.OutOfMemoryError
        return flow(*args)

    monkeypatch.setattr(pipeline.transformer, "flow", scarce)
    with pytest.warns(UserWarning, match="^denoise: memory ran out; trying again with less: "):
        assert equal(drawn(pipeline), undisturbed)
    assert ways == [(RUNGS[0], 0)] * 2 + [(RUNGS[-1], kept)] * 2


def test_where_there_is_no_smaller_plan(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at once, without a warning, and is forgotten."""
    monkeypatch.setattr(Planner, "ladder", lambda _: RUNGS[:1])
    parts = load_parts(settings)
    with monkeypatch.context() as patch:
        scarce = Scarce(patch, parts.networks, 40)
        with pytest.raises(DeviceMemoryError, match=NO_MORE):
            Pipeline.from_settings(settings, parts)
    assert (scarce.reads, scarce.bare()) == (40, True)
    assert Pipeline.from_settings(settings, parts).plan.everything_stays


def test_what_came_in_part_is_not_taken_for_the_whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever broke it off."""
    parts = load_parts(settings)
    network = parts.networks["transformer"]
    read, reads = Source.__call__, []

    def broken(source: Source, name: str) -> Tensor:
        reads.append(name)
        if len(reads) == 5:
            raise KeyboardInterrupt
        return read(source, name)

    monkeypatch.setattr(Source, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        network.enter()
    assert not network.here
    assert all(tensor.is_meta for tensor in network.module.state_dict().values())
    network.enter()
    assert not any(tensor.is_meta for tensor in network.module.state_dict().values())


# ---- plans ---------------------------------------------------------------------------------------


def test_less_than_could_not_stay(full: dict[str, Network], planner: Planner) -> None:  # noqa: F811
    """At full size, down the ladder of a GPU: what stays is what is measured, and the next plan is less everywhere."""
    job = Job(128, 128, 1, 28, 2, 256)
    plan, seen = planner.plan(job, 40 * 10**9), []
    while plan.peaks["loading"]:
        with Meter() as meter:
            Residency(full).arrange(plan.modes)
        assert meter.peak == plan.peaks["loading"]
        for network in full.values():
            network.leave()
        less = planner.smaller(job, plan, "loading")
        assert less is not None
        assert less.peak <= 0.75 * plan.peaks["loading"]
        assert planner.plan(job, 40 * 10**9).modes == less.modes  # from now on
        seen.append(less.modes)
        plan = less
    assert seen == RUNGS[1:3]
    assert planner.smaller(job, plan, "loading") is None
    assert planner.plan(job, 40 * 10**9).modes == RUNGS[2]
    words = "memory: 500 MB do not suffice for 1024x1024: the smallest plan takes 830 MB, to encode"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        planner.plan(job, 500_000_000)


def test_a_picture_too_large_for_that_is_still_drawn_in_less(planner: Planner) -> None:  # noqa: F811
    """Of eight pictures at a time as many as go into less than the weights that could not stay."""
    job = Job(180, 180, 8, 28, 2, 256)
    plan = planner.predict(RUNGS[1], job, 8, 10**11)
    less = planner.smaller(job, plan, "loading")
    assert less is not None
    assert less.peak <= 0.75 * plan.peaks["loading"] < planner.predict(RUNGS[2], job, 1, 10**11).peak
    assert (less.modes, less.batch < 8, less.kept > 0) == (RUNGS[3], True, True)
