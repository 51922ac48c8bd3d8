"""Solvers and noise levels as a user names them: what is refused, what stands in the picture, what is drawn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference import relative_error
from sweeps import sampled
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.output import parameters, save_image, settings_in
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.sampling import levels_of, sigmas_of, solver_of
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings, identity
from samplers import SCHEDULES, SOLVERS
from samplers.noise import going_on

DEFAULTS = {"width": 64, "height": 48, "steps": 3, "cfg": 4.5, "t5_length": 20}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = toy_folder(tmp_path_factory.mktemp("sampling"), defaults=DEFAULTS)
    return Pipeline.load(folder, dtype="fp32", device="cpu")


def traced(pipeline: Pipeline, **keywords: Any) -> dict[str, torch.Tensor]:
    trace: dict[str, torch.Tensor] = {}
    pipeline.run(pipeline.asked({"prompt": "a horse", **keywords}), trace)
    return trace


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    ({"sigmas": "x.txt"}, "sigmas is 'x.txt': No such file or directory: expected falling numbers, as in 1,0.6,0.2"),
    ({"sigmas": ""}, "sigmas is '': expected noise levels above 0, up to 1"),
    ({"sigmas": "0"}, "sigmas is '0': expected noise levels above 0"),
    ({"sigmas": "1.01,0.5"}, "sigmas is '1.01,0.5': expected noise levels above 0, up to 1"),
    ({"sigmas": "1,nan"}, "sigmas is '1,nan': expected noise levels"),
    ({"sigmas": "1,1e-50"}, "sigmas is '1,1e-50': expected noise levels"),  # 0 in float32
    ({"sigmas": "1,0.5,0.6"}, "sigmas is 0.6 after 0.5: expected levels that fall"),
    ({"sigmas": "1,0.5,0.49999999999"}, "sigmas is 0.5 after 0.5: expected levels that fall"),  # in float32
    ({"sigmas": [1, "x"]}, r"sigmas is \[1, 'x'\]: expected text"),
    ({"sigmas": "1,0.5", "steps": 3}, "steps is 3, but sigmas has 2: expected one of them"),
    ({"sigmas": "1,0.5", "schedule": "karras"}, "schedule is karras, but sigmas says all levels"),
    ({"sigmas": "1,0.5", "shift": "2"}, "shift is 2, but sigmas are taken as they are"),
    ({"shift": "0"}, "shift is '0': expected a number from 0.001 to 1000, or auto"),
    ({"shift": "nan"}, "shift is 'nan': expected a number"), ({"shift": True}, "shift is True: expected text"),
    ({"sampler": "dpm"}, "sampler is 'dpm': expected one of euler, heun, dpmpp_2m"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings("a horse", **given).resolved({})


def test_levels_from_a_file(tmp_path: Path) -> None:
    """The same settings as the numbers themselves, wherever the file lies; a 0 at the end makes no difference."""
    first, second = tmp_path / "a.txt", tmp_path / "b.csv"
    first.write_text("0.9, 0.5\n0.25\n")
    second.write_text(" 0.9 0.5\t0.25,0.0")
    given = (str(first), str(second), "0.9,0.5,.25", [0.9, 0.5, 0.25], (0.9, 0.5, 0.25, 0))
    read = {Settings("a horse", sigmas=sigmas).resolved({}) for sigmas in given}
    assert read == {Settings("a horse", sigmas="0.9,0.5,0.25", steps=3, **rest())}
    assert len({identity(s) for s in read} | {identity(Settings("a horse", steps=3, **rest()))}) == 2
    assert sigmas_of(read.pop(), 3.0).tolist() == torch.tensor([0.9, 0.5, 0.25, 0.0]).tolist()
    for text, message in (("1 x", r"a.txt has what is no number"), ("1 2", r"a.txt has .*: expected noise levels")):
        first.write_text(text)
        with pytest.raises(SettingsError, match=message):
            Settings("a horse", sigmas=str(first)).resolved({})
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "x.bin", "no text")):
        (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SettingsError, match=message):
            Settings("a horse", sigmas=str(path)).resolved({})


def rest() -> dict[str, Any]:
    return {name: value for name, value in SD35_MEDIUM_DEFAULTS.items() if name != "steps"}


def test_levels_that_are_told() -> None:
    """What memory is planned for: Heun's method asks at no other levels than Euler's, stochastic ones below 1."""
    s = Settings("a horse", steps=4).resolved({})
    expected = SCHEDULES["normal"](4, 3.0).tolist()[:-1]
    assert levels_of(s, 3.0) == levels_of(replace(s, sampler="heun"), 3.0) == expected
    assert levels_of(replace(s, sampler="dpmpp_2m_sde"), 3.0)[1:] == expected[1:]
    assert solver_of(replace(s, sampler="unipc")) is SOLVERS["unipc"]
    for schedule, spaced in SCHEDULES.items():
        assert torch.equal(sigmas_of(replace(s, schedule=schedule, shift="2.5"), 3.0), spaced(4, 2.5))


def test_other_programs_read_the_names() -> None:
    s = Settings("a horse", sampler="dpmpp_2m", schedule="karras").resolved({})
    assert "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5" in parameters(s)
    assert "sampler" not in parameters(s)
    given = parameters(Settings("a horse", sigmas="1,0.5").resolved({}))
    assert "Steps: 2, Sampler: Euler, CFG scale" in given
    assert 'sigmas: "1.0,0.5"' in given


# ---- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(SOLVERS, 2))
def test_a_batch_is_its_singles(pipeline: Pipeline, name: str) -> None:
    """Each picture has its own solver, and its own noise where that takes some; four steps as the solver is called."""
    both = traced(pipeline, sampler=name, schedule="sgm_uniform", steps=4, count=2, seed=5, cfg=1)
    for i in range(2):
        single = traced(pipeline, sampler=name, schedule="sgm_uniform", steps=4, seed=5 + i, cfg=1)
        assert relative_error(both["latents.3"][i : i + 1], single["latents.3"]) <= 1e-5
    cond, start = pipeline.encode(["a horse"], 20), pipeline.noise(64, 48, [6])
    way = pipeline.velocity(cond)
    with torch.no_grad():
        called = SOLVERS[name](way, start, SCHEDULES["sgm_uniform"](4, 3.0), noise=going_on(6, start))
    assert relative_error(both["latents.3"][1:], called) <= 1e-5


def test_levels_written_out_are_walked(pipeline: Pipeline, tmp_path: Path) -> None:
    """From below 1 the start has that share of noise; the watchers' last step is the last; the PNG has the numbers."""
    file = tmp_path / "levels.txt"
    file.write_text("0.8 0.3")
    last: list[bool] = []
    result = pipeline.run(pipeline.asked({"prompt": "a horse", "sigmas": str(file)}))
    pipeline("a horse", sigmas=str(file), on_step=lambda event: last.append(event.last))
    assert last == [False, True]
    trace = traced(pipeline, sigmas=[0.8, 0.3])
    assert trace["sigmas"].tolist() == torch.tensor([0.8, 0.3, 0.0]).tolist()
    begun = trace["latents.0"] - torch.tensor(0.3 - 0.8) * trace["velocity.0"]
    assert relative_error(begun, 0.8 * trace["noise"]) <= 1e-5
    path = save_image(result.images[0], replace(result.settings, out=str(tmp_path)), tmp_path / "x.png")
    file.unlink()
    with Image.open(path) as image:
        own = json.loads(image.text["mmdit"])
    assert (own["sigmas"], own["steps"]) == ("0.8,0.3", 2)
    read = settings_in(path)
    assert read is not None
    assert pipeline.check(replace(read, out="out")) == pipeline.check(replace(result.settings, out="out"))


def test_the_shift_of_the_size(pipeline: Pipeline) -> None:
    """auto becomes a number, which is the model's own at its usual size; a number stands in its place."""
    assert pipeline.check(Settings("a horse", shift="auto", **loaded(pipeline))).shift == "3"
    large = pipeline.check(Settings("a horse", shift="auto", width=128, height=96, **loaded(pipeline)))
    assert large.shift == "6"
    trace = traced(pipeline, shift="auto", width=128, height=96, steps=3, cfg=1)
    assert torch.equal(trace["sigmas"], SCHEDULES["normal"](3, 6.0))
    assert torch.equal(traced(pipeline, shift=1.5, cfg=1)["sigmas"], SCHEDULES["normal"](3, 1.5))


def loaded(pipeline: Pipeline) -> dict[str, Any]:
    return {"model": pipeline.settings.model, "dtype": "fp32", "device": "cpu"}


def test_too_many_levels_are_refused_before_anything_is_drawn(pipeline: Pipeline) -> None:
    with pytest.raises(SettingsError, match="schedule beta has no 200 levels that differ, but 138"):
        pipeline("a horse", schedule="beta", steps=200)


def test_noise_lies_where_it_is_denoised(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device, as texts are, so that the stages work by hand; a device without memory stands for a GPU."""
    monkeypatch.setattr(pipeline, "device", torch.device("meta"))
    noise = pipeline.noise(64, 48, [6, 7])
    assert noise.device.type == "meta" and noise.shape == (2, 16, 6, 8)
