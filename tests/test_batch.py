"""Lists of pictures drawn together: each is the picture that it is alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import relative_error
from sweeps import sampled
from test_memory import full, planner  # noqa: F401
from torch import Tensor
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver import loop
from mmdit.driver import texts as encoding
from mmdit.driver.loop import Drawing
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.memory.meter import FusedAttention, Meter
from mmdit.memory.plan import Job, Plan
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Mode, Network, Residency
from mmdit.prepared import Prepared

DEFAULTS = {"width": 48, "height": 32, "steps": 3, "cfg": 4.5, "t5_length": 20}

LIST: list[Any] = [
    "a horse",
    {"prompt": "a bear", "seed": 7},
    {"prompt": "a horse", "width": 32, "height": 48},
    {"prompt": "a bear", "negative": "a pig", "seed": 2**63},
    {"prompt": "a horse", "cfg": 1, "count": 2},
    {"prompt": "a horse", "seed": 1, "count": 3},
    {"prompt": "a bear", "t5_length": 40},
    {"prompt": "馬", "steps": 2, "negative": "a horse"},
    "a horse",
    "",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("batch"), defaults=DEFAULTS)


@pytest.fixture(scope="module", params=["on", "omit"])
def pipelines(model: Path, request: pytest.FixtureRequest) -> tuple[Pipeline, Pipeline]:
    """The model twice: what happens to the first does not touch the second, for comparisons."""
    load = {"dtype": "fp32", "device": "cpu", "t5": request.param}
    return Pipeline.load(model, **load), Pipeline.load(model, **load)


@pytest.fixture
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, dtype="fp32", device="cpu")


def watched(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents that are decoded from now on."""
    latents: list[Tensor] = []
    decode = pipeline.decode

    def see(z: Tensor, *more: Any) -> Tensor:
        latents.append(z.clone())
        return decode(z, *more)

    monkeypatch.setattr(pipeline, "decode", see)
    return latents


def assert_single(pipeline: Pipeline, settings: Settings, image: Image.Image, latents: Tensor) -> None:
    """That a picture of a list is the one that it is alone."""
    trace: dict[str, Tensor] = {}
    alone = pipeline.run(settings, trace)
    assert alone.settings == settings
    assert relative_error(latents, trace[f"latents.{alone.settings.steps - 1}"]) <= 1e-5
    assert int(np.abs(np.asarray(image, int) - np.asarray(alone.images[0], int)).max()) <= 1


def drawn(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, wanted: list[Any]) -> list[tuple]:
    """Settings, pictures and latents of a list."""
    latents = watched(pipeline, monkeypatch)
    pictures = list(pipeline.draw_many(wanted))
    assert len(pictures) == len(latents)
    return [(settings, image, z) for (settings, image), z in zip(pictures, latents)]


def limited(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    """At most so many pictures at a time."""
    plan = pipeline.planner.plan
    monkeypatch.setattr(
        pipeline.planner, "plan", lambda job, *given: replace(plan(job, *given), batch=min(job.count, pictures))
    )


@pytest.mark.parametrize("at_once", sampled([100, 2], 2))
def test_each_picture_is_the_one_it_is_alone(
    pipelines: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Of mixed sizes, steps, guidance, texts and seeds; all that was asked for, in whatever order."""
    ours, other = pipelines
    limited(ours, monkeypatch, at_once)
    found = drawn(ours, monkeypatch, LIST)
    asked = [entry if isinstance(entry, dict) else {"prompt": entry} for entry in LIST]
    expected = [
        ({**DEFAULTS, "negative": "", **e}, e.get("seed", 0) + i) for e in asked for i in range(e.get("count", 1))
    ]
    names = ("prompt", "negative", "width", "height", "steps", "cfg", "t5_length")
    told = [(*(getattr(s, name) for name in names), s.seed) for s, _, _ in found]
    assert sorted(told) == sorted((*(e[name] for name in names), seed) for e, seed in expected)
    for settings, image, latents in found:
        assert image.size == (settings.width, settings.height)
        assert_single(other, settings, image, latents)


def sizes(pipeline: Pipeline) -> list[int]:
    """The transformer's batches, from now on."""
    seen: list[int] = []
    pipeline.transformer.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("cfg", "rows"), [(4.5, 10), (1, 5)])
def test_equal_shapes_are_one_batch(pipeline: Pipeline, cfg: float, rows: int) -> None:
    """Whatever their texts and seeds are, one evaluation a step."""
    seen = sizes(pipeline)
    texts = ("a horse", "a bear", "a pig")
    wanted = [{"prompt": text, "negative": text[::-1], "seed": i} for i, text in enumerate(texts)]
    pictures = list(pipeline.draw_many([*wanted, {"prompt": "an owl", "count": 2}], cfg=cfg))
    assert (len(pictures), seen) == (5, [rows] * 3)


def test_batches_are_as_equal_as_can_be(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven where five would be fast are four and three, not five and two."""
    tokens = 2 * (3 * 2 + 20)
    monkeypatch.setattr(loop, "_TOKENS_ELSEWHERE", 5 * tokens)
    seen = sizes(pipeline)
    assert len(list(pipeline.draw_many([{"prompt": "a horse", "count": 7}]))) == 7
    assert seen == [8] * 3 + [6] * 3


@pytest.fixture
def encoded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """What is encoded from now on, call by call."""
    calls: list[tuple[list[str], int]] = []
    encode = pipeline.encode
    monkeypatch.setattr(
        pipeline, "encode", lambda texts, length: calls.append((texts, length)) or encode(texts, length)
    )
    return calls


def test_each_text_is_encoded_once(
    pipeline: Pipeline, encoded: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is drawn; without guidance no negative prompt; so many at a time as the plan says."""
    wanted = [*LIST, {"prompt": "an owl", "negative": "unused", "cfg": 1}]
    monkeypatch.setattr(pipeline.planner, "texts", lambda *_: 3)
    pictures = pipeline.draw_many(wanted)
    assert encoded == []
    next(pictures)
    assert [(len(texts), length) for texts, length in encoded] == [(3, 20), (3, 20), (2, 40)]
    list(pictures)
    assert len(encoded) == 3
    assert sorted(t for texts, _ in encoded[:2] for t in texts) == sorted(
        ["a horse", "", "a bear", "a pig", "馬", "an owl"]
    )
    assert encoded[2] == (["a bear", ""], 40)


def test_texts_that_are_too_many_to_keep(
    pipeline: Pipeline, encoded: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is drawn in parts; the pictures are the same."""
    expected = {settings: np.asarray(image, int) for settings, image in pipeline.draw_many(LIST)}
    encoded.clear()
    monkeypatch.setattr(encoding, "_KEPT_AT_MOST", 3 * (77 + 40) * 256 * 4)
    found = dict(pipeline.draw_many(LIST))
    assert found.keys() == expected.keys()
    assert all(np.abs(np.asarray(image, int) - expected[s]).max() <= 1 for s, image in found.items())
    assert len(encoded) > 3
    assert all(len(texts) <= 4 for texts, _ in encoded)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "x", "stepz": 3}, "no setting 'stepz': did you mean steps"),
        ({"prompt": "x", "width": 100}, "width 100 is not a multiple of 16"),
        ({"prompt": "x", "t5": "off"}, "t5 is fixed when the model is loaded"),
        ({"prompt": "x", "out": "y"}, "out belongs to the command line"),
        ({"prompt": "x", "prompts": "y"}, "prompts belongs to the command line"),
        ({"seed": 3}, "a picture without a prompt"),
        ({"prompt": "x", "memory": "1MB"}, "1 MB do not suffice for 48x32"),
        ({"prompt": 3}, "prompt is 3: expected text"),
    ],
)
def test_mistakes_before_anything_is_drawn(
    pipeline: Pipeline, encoded: list[tuple[list[str], int]], entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline.draw_many(["a horse", entry])
    assert encoded == []


def test_keywords_are_defaults_and_settings_stand_for_themselves(pipeline: Pipeline) -> None:
    whole = replace(pipeline.settings, prompt="a pig", seed=5, steps=1)
    wanted = [{"seed": 3}, whole, {"prompt": "a bear"}]
    found = [settings for settings, _ in pipeline.draw_many(wanted, prompt="a horse", steps=2)]
    assert sorted((s.prompt, s.seed, s.steps) for s in found) == [("a bear", 0, 2), ("a horse", 3, 2), ("a pig", 5, 1)]
    assert list(pipeline.draw_many([])) == []


def test_the_pipeline_may_be_used_meanwhile(
    pipelines: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pictures of a list another is drawn, of another size and by another plan; or the list is let go."""
    ours, other = pipelines
    limited(ours, monkeypatch, 2)
    for settings, image in ours.draw_many(["a horse", "a bear", "a pig", {"prompt": "an owl", "width": 64}]):
        ours("a cow", width=48, steps=1)
        assert np.abs(np.asarray(image, int) - np.asarray(other.run(settings).images[0], int)).max() <= 1
    pictures = ours.draw_many(["a horse", "a bear", "a pig"])
    next(pictures)
    pictures.close()
    assert len(ours("a cow")) == 1


# ---- memory --------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_a_smaller_plan_from_then_on(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second batch of three: it is begun again, the third goes by the smaller plan, and all are drawn."""
    wanted = [{"prompt": text, "seed": i} for i, text in enumerate(["a horse", "a bear", "a pig"] * 2)]
    expected = {settings: np.asarray(image, int) for settings, image in pipeline.draw_many(wanted)}
    limited(pipeline, monkeypatch, 2)
    flow, plans = pipeline.transformer.flow, []

    def scarce(*args: Any) -> Tensor:
        plans.append(pipeline.plan)
        if len(plans) == 5:
            raise torch.OutOfMemoryError
        return flow(*args)

    monkeypatch.setattr(pipeline.transformer, "flow", scarce)
    with pytest.warns(UserWarning, match=r"^denoise: memory ran out; trying again with less: ") as warned:
        found = dict(pipeline.draw_many(wanted))
    assert len(warned) == 1
    assert found.keys() == expected.keys()
    assert all(np.abs(np.asarray(image, int) - expected[s]).max() <= 1 for s, image in found.items())
    assert plans[-1].peaks["denoise"] < plans[0].peaks["denoise"]


def test_encoders_that_left_stay_away(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """For pictures whose texts are encoded; the next list brings them back."""
    everything = dict.fromkeys(pipeline.plan.modes, Mode.RESIDENT)
    without = {**everything, **dict.fromkeys(("clip_l", "clip_g", "t5"), Mode.STREAMED)}
    monkeypatch.setattr(pipeline.planner, "ladder", lambda: [everything])
    drawing = Drawing(pipeline, [pipeline.check(replace(pipeline.settings, prompt="a horse"))])
    job = pipeline.job(drawing.pictures[0])
    for modes in (everything, without):
        pipeline.follow(replace(pipeline.plan, modes=modes), job)
        assert drawing._plan(job)[1].modes == modes
    assert len(list(drawing)) == 1
    assert pipeline.plan.modes == everything


@pytest.mark.parametrize(("texts", "pictures"), sampled([(2, 3), (1, 5)], 2))
def test_texts_of_their_own_take_what_is_predicted(
    full: dict[str, Network], planner: Planner, texts: int, pictures: int  # noqa: F811
) -> None:  # fmt: skip
    """Denoising of pictures with different texts, at full size: within 10 %, and more than with one text."""
    job = Job(64, 64, pictures, 28, texts, 256, apart=True)
    modes, rows = dict.fromkeys(full, Mode.RESIDENT), texts * pictures
    plan = planner.predict(modes, job, pictures, 10**12)
    with torch.no_grad(), FusedAttention(), Meter() as meter:
        Residency(full).arrange(modes)
        context = torch.empty(rows, 77 + 256, 4096, dtype=torch.bfloat16, device="meta")
        pooled = torch.empty(rows, 2048, dtype=torch.bfloat16, device="meta")
        prepared = Prepared(full["transformer"].module, context, pooled, torch.linspace(1, 0.1, 28).tolist())
        x = torch.empty(pictures, 16, 64, 64, device="meta")
        prepared(torch.cat([x] * texts).bfloat16(), 1.0, range(rows)).float()
    stay = planner.predict(modes, job, pictures, 0).peaks["denoise"] - meter.peak
    assert abs(stay) <= 0.1 * meter.peak
    one = planner.predict(modes, job._replace(apart=False), pictures, 10**12)
    assert plan.peaks["denoise"] > one.peaks["denoise"]


def test_as_many_texts_at_a_time_as_fit(full: dict[str, Network], planner: Planner) -> None:  # noqa: F811
    """T5's peak, measured, keeps to the budget, and with twice the texts it would not; never less than a picture's."""
    job, modes = Job(64, 64, 1, 28, 2, 256), dict.fromkeys(full, Mode.RESIDENT)
    plan = planner.predict(modes, job, 1, 10**12)
    assert planner.texts(job, plan, 10**12, 50) == 50
    assert planner.texts(job, plan, 0, 50) == 2
    assert planner.texts(job, plan, 10**12, 1) == 2
    budget = int(plan.peaks["encode"] + 300e6)

    def measured(texts: int) -> int:
        with torch.no_grad(), FusedAttention(), Meter() as meter:
            full["t5"].module(torch.zeros(texts, 256, dtype=torch.long))
        return meter.peak

    Residency(full).arrange(modes)
    size, room = planner.texts(job, plan, budget, 64), 300e6 + measured(2)
    assert 2 < size < 64
    assert measured(size) <= 1.01 * room
    assert measured(2 * size) > room


# ---- texts that wait ---------------------------------------------------------------------------------


def test_texts_that_wait_are_planned_with(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan of a list, for encoding and for denoising, knows what its encoded texts take, to the byte."""
    jobs, encoded, plan_for, encode = [], list[int](), pipeline.plan_for, pipeline.encode

    def planned(job: Job) -> Plan:
        jobs.append(job)
        return plan_for(job)

    def counted(texts: list[str], length: int) -> Any:
        found = encode(texts, length)
        encoded.append(found.context.nbytes)
        return found

    monkeypatch.setattr(pipeline, "plan_for", planned)
    monkeypatch.setattr(pipeline, "encode", counted)
    wanted = [{"prompt": text, "seed": 1} for text in ("a horse", "a bear", "a pig")]
    list(pipeline.draw_many(wanted))
    assert sum(encoded) > 0
    waiting = [job.waiting for job in jobs if job.waiting]
    assert len(waiting) >= 2  # to encode, and to denoise
    assert set(waiting) == {sum(encoded)}
    jobs.clear()
    encoded.clear()
    pipeline("a horse")
    assert {job.waiting for job in jobs if job.waiting} == {sum(encoded)}


def test_where_texts_that_wait_leave_no_room_the_plan_is_made_without_them(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = pipeline.planner.plan, []

    def narrow(job: Job, *given: Any) -> Plan:
        asked.append(job.waiting)
        if job.waiting:
            raise SettingsError("memory: no room")
        return plan(job, *given)

    monkeypatch.setattr(pipeline.planner, "plan", narrow)
    assert len(list(pipeline.draw_many(["a horse", "a bear"]))) == 2
    assert 0 in asked and max(asked) > 0
