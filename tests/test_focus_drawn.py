"""Subjects kept apart in whole drawings: against a dense version written otherwise, in batches, plans, combinations."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import relative_error
from sweeps import sampled
from torch import Tensor
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.attention import Attention
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.watch import Stepped, Watcher
from mmdit.memory.budget import DeviceMemoryError
from mmdit.run import main

PROMPT = "a horse, a bear and a fox"
FOCUS = {"focus": "horse; bear", "focus_scale": 30.0, "focus_until": 0.0, "focus_gain": "unit"}
LAST = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    defaults = {"width": 96, "height": 64, "steps": 4, "cfg": 4.5, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("focus"), defaults=defaults)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder, device="cpu", dtype="fp32")


def traced(pipeline: Pipeline, **keywords: Any) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    s = replace(pipeline.settings, **{"prompt": PROMPT, "negative": "a pig", **keywords})
    pipeline.run(s, trace)
    return trace


def end_of(pipeline: Pipeline, **keywords: Any) -> Tensor:
    return traced(pipeline, **keywords)[f"latents.{LAST}"]


# ---- a dense version ---------------------------------------------------------------------------------


def dense(pipeline: Pipeline, trace: dict[str, Tensor], groups: list[list[int]], scale: float) -> list[Tensor]:
    """Latents of the released method's steps: every table of attention kept, every formula written out.

    groups: of each subject, its tokens of the context.
    """
    model, x, found = pipeline.transformer, trace["noise"], []
    sigmas, cfg = trace["sigmas"].tolist(), 4.5
    for sigma, after in pairwise(sigmas):
        level = torch.full((1,), sigma)
        tables: list[Tensor] = []

        def backend(q: Tensor, k: Tensor, v: Tensor, _: object, tables: list[Tensor] = tables) -> Tensor:
            table = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / q.shape[-1] ** 0.5).softmax(-1)  # (1, H, N, M)
            tables.append(table)
            return (table @ v.transpose(1, 2)).transpose(1, 2)

        leaf = x.clone().requires_grad_()
        rows, columns = model.grid(leaf)
        for block in model.joint_blocks:
            attn: Any = block.x_block.attn
            attn.backend = backend
        cond = model(leaf, level, trace["cond.context"], trace["cond.pooled"])
        for block in model.joint_blocks:
            attn = block.x_block.attn
            del attn.backend
        tokens = [token for group in groups for token in group]
        maps = torch.stack([t[0, :, -rows * columns :, tokens].mean(0).T for t in tables]).mean(0)  # (tokens, N)
        maps = smoothed(maps.reshape(len(tokens), rows, columns)).flatten(1)
        mine, parts = iter(maps), []
        for group in groups:
            parts.append(torch.stack([next(mine) for _ in group]))
        several = [apart(part) for part in parts if len(part) > 1]
        coherence = torch.stack(several).mean() if several else torch.zeros(())
        cost = (coherence + 1 - apart(torch.stack([part.mean(0) for part in parts]))) / 2
        (gradient,) = torch.autograd.grad(cost, leaf)
        with torch.no_grad():
            uncond = model(x, level, trace["uncond.context"], trace["uncond.pooled"])
            t = 1 - sigma
            gain = (1 - t) * 2 * (1 - t + 1e-3) / (t + 1e-3)
            velocity = uncond + cfg * (cond.detach() - uncond) + scale * gain * gradient
            x = x + (after - sigma) * velocity
        found.append(x)
    return found


def smoothed(maps: Tensor) -> Tensor:
    """By a Gaussian of 3 x 3, a mirror at the edges."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2) / 2)
    kernel = torch.outer(line / line.sum(), line / line.sum())[None, None]
    padded = torch.nn.functional.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel)[:, 0]


def apart(maps: Tensor) -> Tensor:
    """The divergence of maps `(n, places)`, cubed first, as the released program has it."""
    q = maps**3
    q = q / q.sum(1, keepdim=True).clamp(min=1e-10)
    middle = q.mean(0)
    return (q * ((q + 1e-10).log() - (middle + 1e-10).log())).sum(1).mean() / np.log(len(q))


@pytest.mark.parametrize("more", sampled([{}, {"t5": "off"}, {"t5_length": 256}, {"width": 64, "height": 160}], 2))
def test_it_is_the_released_method(folder: Path, pipeline: Pipeline, more: dict[str, Any]) -> None:
    """Every step, with its window of all steps and its gain, whose first is 2002."""
    loaded = {name: more[name] for name in more if name == "t5"}
    pipe = Pipeline.load(folder, device="cpu", dtype="fp32", **loaded) if loaded else pipeline
    given = {**more, "focus": "horse; bear", "focus_scale": 2.0, "focus_until": 0.0, "focus_gain": "code"}
    trace = traced(pipe, **given)
    assert traced(pipe, **more)["latents.0"].sub(trace["latents.0"]).abs().max() > 1e-3
    columns = [list(found.columns) for found in pipe.found(PROMPT, "horse; bear", **more)]
    assert all(own[0] < 77 and (own[-1] >= 77) == ("t5" not in more) for own in columns)
    for i, latents in enumerate(dense(pipe, trace, columns, 2.0)):
        assert relative_error(trace[f"latents.{i}"], latents) <= 1e-4


# ---- as any other guidance ---------------------------------------------------------------------------


def test_without_strength_it_is_the_plain_picture(pipeline: Pipeline) -> None:
    """Bit for bit, also where maps are looked at."""
    plain = end_of(pipeline)
    assert torch.equal(end_of(pipeline, focus="horse; bear", focus_scale=0.0), plain)
    assert torch.equal(end_of(pipeline, attention_maps="horse; bear"), plain)
    assert relative_error(end_of(pipeline, **FOCUS), plain) > 1e-3


@pytest.mark.parametrize("loss", sampled(["focus", "attend-and-excite", "jedi", "conform", "divide-and-bind"], 3))
def test_a_list_equals_its_singles(pipeline: Pipeline, loss: str) -> None:
    """Pictures with other subjects, and with none, drawn together."""
    own = [{"focus": "horse; bear"}, {"focus": "a bear; fox", "attention_maps": "horse"}, {}, {"focus": "fox; horse"}]
    asked = [{"prompt": PROMPT, "seed": i, **one} for i, one in enumerate(own)]
    scale = {"focus_scale": 3.0, "focus_until": 0.5, "focus_gain": "step", "focus_loss": loss}
    every = [{**one, **(scale if "focus" in one else {})} for one in asked]
    every[2] |= {"focus": "fox; bear", **scale, "focus_scale": 3.0}
    together = {s.seed: np.array(image) for s, image in pipeline.draw_many(every)}
    for i, one in enumerate(every):
        alone = np.array(pipeline(**one)[0])
        assert np.abs(together[i].astype(int) - alone.astype(int)).max() <= 1


def test_conform_compares_with_the_step_before(pipeline: Pipeline) -> None:
    costs: list[float] = []
    way = {**FOCUS, "focus_loss": "conform", "focus_gain": "relative", "focus_scale": 0.1}
    pipeline(PROMPT, **way, on_step=lambda event: costs.append(float(event.attention.attended.cost)))
    assert costs[0] == 0 and all(cost > 0 for cost in costs[1:])


def test_the_prompts_evaluation_serves_guidance(pipeline: Pipeline) -> None:
    """One evaluation with gradients and one for the negative; below the window, both at once as ever."""
    sizes: list[int] = []
    hook = pipeline.transformer.x_embedder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trace = traced(pipeline, **FOCUS | {"focus_until": 0.7})
    hook.remove()
    steep = sum(sigma >= 0.7 for sigma in trace["sigmas"][:-1].tolist())
    assert 0 < steep < 4
    assert sizes == [1, 1] * steep + [2] * (4 - steep)


WAYS: list[dict[str, Any]] = [
    {"cfg": 1},
    {"sampler": "heun", "slg": 2.0, "slg_layers": "1", "slg_interval": "0:1"},
    {"sampler": "dpmpp_2m_sde", "cfg_zero": True, "pag": 1.0},
    {"apg": "0:5:-0.5", "cache": 0.1, "also": ("a pig:0.5",)},
    {"init": True, "strength": 0.9, "mask": True},
    {"long_prompts": True, "prompt": "a horse, " * 40 + "a bear", "focus": "horse; bear"},
]


@pytest.mark.parametrize("way", sampled(WAYS, 2))
def test_it_goes_with_all_the_rest_where_blocks_come_and_go(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """The same latents with the transformer streamed; and it does something."""
    way = {**FOCUS, **way}
    if way.get("init"):
        random = np.random.default_rng(0)
        way["init"] = Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8))
        way["mask"] = Image.fromarray(np.pad(np.full((40, 40), 255, np.uint8), ((10, 14), (20, 36))))
    keywords = {name: value for name, value in way.items() if name not in ("prompt",)}
    prompt = way.get("prompt", PROMPT)
    expected = last_of(pipeline, prompt, keywords)
    plain = {name: value for name, value in keywords.items() if not name.startswith("focus")}
    assert relative_error(expected, last_of(pipeline, prompt, plain)) > 1e-4
    ladder = pipeline.planner.ladder
    monkeypatch.setattr(pipeline.planner, "ladder", lambda: ladder()[-1:])
    assert relative_error(last_of(pipeline, prompt, {**keywords, "memory": "2GB"}), expected) <= 1e-5
    assert "comes block by block" in str(pipeline.ended_with)


def last_of(pipeline: Pipeline, prompt: str, keywords: dict[str, Any]) -> Tensor:
    trace: dict[str, Tensor] = {}
    pipeline.run(pipeline.asked({"prompt": prompt, "seed": 3, **keywords}), trace)
    return trace[max((name for name in trace if name.startswith("latents.")), key=lambda name: int(name[8:]))]


def test_maps_and_what_steps_saw(pipeline: Pipeline) -> None:
    """From Python: every step's maps by block; they are what the capture has, and the cost falls for the push."""
    seen: list[Any] = []
    pipeline(PROMPT, **FOCUS, attention_maps="fox", on_step=lambda event: seen.append(event.attention))
    assert all(one.attended.cost is not None and one.attended.push > 0 for one in seen)
    (found,) = pipeline.attention_maps(PROMPT, "horse; a bear", seed=3)
    assert list(found.maps) == ["horse", "a bear"]
    depth = pipeline.transformer.config.depth
    assert {tuple(maps.shape) for maps in found.maps.values()} == {(4, depth, 4, 6)}
    words = pipeline.found(PROMPT, "horse; a bear")[1].columns
    with pipeline.capture(("attention",), words=words) as captured:
        pipeline(PROMPT, seed=3)
    for step in range(4):
        for block in range(depth):
            expected = captured["words"][step, block][0].mean(dim=(0, 2)).reshape(4, 6)  # of (H, N, words)
            assert relative_error(found.maps["a bear"][step, block], expected) <= 1e-5
    assert found.sheet().size[1] > 2 * 96


def test_maps_of_a_picture_in_two_passes_are_the_seconds(pipeline: Pipeline) -> None:
    (found,) = pipeline.attention_maps(PROMPT, "horse", width=64, height=64, upscale=1.5, upscale_strength=0.5)
    assert found.image.size == (96, 96) and found.maps["horse"].shape[2:] == (6, 6)
    assert len(found.maps["horse"]) == 2
    with pytest.raises(SettingsError, match="attention_at: upscale is given"):
        pipeline.attention_at(PROMPT, 5, 5, upscale=1.5)


def test_maps_of_a_region_lie_in_it(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a picture whose lower right corner is drawn anew: its sheet shows that corner."""
    init, mask = Image.new("RGB", (160, 128), "white"), Image.new("L", (160, 128))
    mask.paste(255, (120, 104, 160, 128))
    given: dict[str, Any] = {"init": init, "mask": mask, "mask_crop": 8, "mask_blur": 0, "width": 96, "height": 64}
    (found,) = pipeline.attention_maps(PROMPT, "horse", **given)
    assert found.image.size == (160, 128) and found.region == (112, 96, 160, 128)
    monkeypatch.setattr("mmdit.driver.attention.sheet", lambda image, *_: image)
    assert found.sheet().tobytes() == found.image.crop((112, 96, 160, 128)).tobytes()
    with pytest.raises(SettingsError, match="attention_at: mask_crop is given"):
        pipeline.attention_at(PROMPT, 5, 5, **given)


def test_steps_that_ask_nothing_have_no_maps(pipeline: Pipeline) -> None:
    (found,) = pipeline.attention_maps(PROMPT, "horse", cfg_zero=True)
    assert found.steps == (1, 2, 3) and len(found.maps["horse"]) == 3
    assert found.sheet().size[0] > 0


def test_a_picture_that_begins_anew_has_each_step_once(folder: Path) -> None:
    """After an error it takes its steps again."""
    pipeline = Pipeline.load(folder, device="cpu", dtype="fp32")
    failures = [DeviceMemoryError("none left")]

    class Failing(Watcher):
        def step(self, event: Stepped) -> None:
            if (event.index, event.step.index) == (1, 2) and failures:
                raise failures.pop()

    s, seen = pipeline.asked({"prompt": PROMPT, "attention_maps": "horse", "count": 2}), Attention()
    with pytest.warns(UserWarning, match="memory ran out"):
        pipeline.run(s, watchers=[seen, Failing()])
    assert [len(seen.done[i].maps["horse"]) for i in (0, 1)] == [4, 4]


def test_what_a_place_attends_to(pipeline: Pipeline) -> None:
    """Its words are what their maps have there; all of it adds up to one."""
    found = pipeline.attention_at(PROMPT, 50, 20, seed=3)
    total = found.text.sum(1) + found.picture.sum((1, 2))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    (maps,) = pipeline.attention_maps(PROMPT, "bear", seed=3)
    (bear,) = pipeline.found(PROMPT, "bear")
    expected = maps.maps["bear"][:, :, 1, 3].mean(1)  # at each step; 16 pixels are a place
    assert relative_error(found.text[:, list(bear.columns)].mean(1), expected) <= 1e-5
    assert {*found.words} == {"clip_l", "clip_g", "t5"}
    at = found.words["clip_l"][[piece for piece, _ in found.words["clip_l"]].index(bear.pieces["clip_l"][0])]
    assert at[1] == pytest.approx(float(found.text[:, bear.columns[0]].mean()))
    with pytest.raises(SettingsError, match="attention_at: 96, 0 is not in the picture of 96x64"):
        pipeline.attention_at(PROMPT, 96, 0)


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length"), [(1, 20), (2, 256)])
def test_what_goes_back_is_in_the_plan(pipeline: Pipeline, count: int, length: int) -> None:
    """What goes into every block, kept until the way back, and beside it what one block keeps; no table of scores."""
    settings = {"prompt": PROMPT, "width": 512, "height": 384, "steps": 1, "count": count, "t5_length": length}
    job = pipeline.job(pipeline.check(pipeline.asked({**settings, **FOCUS})))
    plain = pipeline.job(pipeline.check(pipeline.asked(settings)))
    activations, config = pipeline.planner.costs.activations, pipeline.transformer.config
    steep, flat = (activations.denoising("transformer", each, count) for each in (job, plain))
    tokens = (32 * 24 + 77 + length) * config.hidden_size * 4 * count  # bytes
    assert job.steep and not plain.steep and steep >= flat
    assert config.depth * tokens < steep < (config.depth + 40) * tokens
    assert activations.denoising_bound("transformer", job, count) >= steep
    one = job._replace(texts=1)  # without the negative's row
    assert activations.denoising("transformer", one, count) > activations.denoising(
        "transformer", one._replace(steep=False), count
    )


# ---- from the command line ---------------------------------------------------------------------------


def test_a_sheet_beside_the_picture_and_a_repeat(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [PROMPT, "--model", str(folder), "--dtype", "fp32", "--out", str(tmp_path), "--verbose",
            "--focus", "horse; bear", "--focus-scale", "0.5", "--attention-maps", "fox; a horse"]  # fmt: skip
    assert main(line) == 0
    said = capsys.readouterr()
    picture, sheet = map(Path, said.out.split())
    assert sheet.name == f"{picture.stem}.attention.png"
    for told in ('"horse": clip_l ', '"fox": clip_l ', "step 4 of 4: noise ", ", cost ", ", push "):
        assert told in said.err
    with Image.open(sheet) as image, Image.open(picture) as drawn:
        assert image.size[0] > drawn.size[0] and image.convert("L").getextrema()[1] == 255
        assert json.loads(drawn.text["mmdit"])["focus"] == "horse; bear"
        first = np.array(drawn)
    assert main(["--from-png", str(picture), "--out", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "again.png")), first)


def test_a_sheet_replaces_no_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But the sheet of an earlier run."""
    line = [PROMPT, "--model", str(folder), "--steps", "1"]
    mapped = [*line, "--attention-maps", "fox", "--out", str(tmp_path / "a.png")]
    other = tmp_path / "a.attention.png"
    assert main([*line, "--out", str(other)]) == 0
    before = other.read_bytes()
    assert main(mapped) == 2
    assert "attention_maps: " in (said := capsys.readouterr().err) and "would be replaced" in said
    assert other.read_bytes() == before and not (tmp_path / "a.png").exists()
    other.unlink()
    assert main(mapped) == main(mapped) == 0


@pytest.mark.parametrize(("given", "told"), [
    (["--focus", "horse; pig"], 'focus: "pig" is not in the prompt'),
    (["--attention-maps", "horse#2"], 'attention_maps: "horse#2": the prompt has "horse" once'),
    (["--focus", "a horse; horse"], 'focus: "a horse" and "horse" have tokens in common'),
    (["--focus", "horse", "--focus-loss", "conform"], 'focus: "horse" alone cannot be kept apart'),
    (["--focus", "horse;;bear"], "focus is 'horse;;bear'"),
    (["--focus-scale", "2"], "focus_scale is 2.0, but focus is not given"),
    (["--focus", "horse; bear", "--focus-until", "2"], "focus_until is 2.0: expected a number from 0 to 1"),
    (["--focus", "horse; bear", "--sigmas", "0.8,0.4"], "focus_until is 0.9, but the picture begins at noise 0.800"),
])  # fmt: skip
def test_bad_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:  # fmt: skip
    assert main([PROMPT, "--model", str(folder), "--out", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not [*tmp_path.iterdir()]
