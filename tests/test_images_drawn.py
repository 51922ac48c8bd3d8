"""Pictures as input, drawn by the demo model: each option from the command line and from Python, in few steps."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from reference import relative_error
from safetensors.torch import load_file
from toys import Ran

from mmdit.common.errors import SettingsError
from mmdit.driver.pictures import result_size, settled
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings, alone
from mmdit.images.options import steps_of
from mmdit.memory.residency import Mode
from mmdit.run import main
from samplers import spherical

PHOTO = Image.fromarray(np.random.default_rng(5).integers(0, 256, (8, 9, 3), np.uint8)).resize((100, 90))
MASK = Image.new("L", (100, 90))
MASK.paste(255, (30, 20, 70, 50))
FEW = {"steps": 2, "cfg": 1.0, "t5_length": 20}
FEW_TOLD = ["--steps", "2", "--cfg", "1", "--t5-length", "20", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(dtype="fp32", device="cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    PHOTO.save(tmp_path / "photo.png")
    MASK.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(pipeline: Pipeline, **keywords: Any) -> np.ndarray:
    return np.asarray(pipeline("a horse", **{**FEW, **keywords})[0], int)


def traced(pipeline: Pipeline, **keywords: Any) -> dict[str, torch.Tensor]:
    trace: dict[str, torch.Tensor] = {}
    pipeline.run(pipeline.asked({"prompt": "a horse", **FEW, **keywords}), trace)
    return trace


def run(capfd: pytest.CaptureFixture, *arguments: str) -> Ran:
    code = main([*arguments, *FEW_TOLD])
    told = capfd.readouterr()
    return Ran(code, told.out.splitlines(), told.err.splitlines())


def array(path: Path | Image.Image) -> np.ndarray:
    if isinstance(path, Image.Image):
        return np.asarray(path, int)
    with Image.open(path) as image:
        return np.asarray(image, int)


# ---- image to image ------------------------------------------------------------------------------


def test_from_the_command_line_as_from_python(files: Path, capfd: pytest.CaptureFixture, pipeline: Pipeline) -> None:
    """The picture, its size, its settings in the PNG, and what --dump has."""
    ran = run(capfd, "a horse", "--init", "photo.png", "--strength", "0.5", "--out", "a.png", "--dump", "a.safetensors")
    assert ran.code == 0 and sorted(ran.lines) == ["a.png", "a.safetensors"]
    found, trace = array(files / "a.png"), load_file(files / "a.safetensors")
    assert found.shape == (90, 100, 3)
    for given in (PHOTO, files / "photo.png", "photo.png"):
        assert np.abs(found - drawn(pipeline, init=given, strength=0.5)).max() <= 1
    with Image.open(files / "a.png") as image:
        told, text = json.loads(image.text["mmdit"]), image.text["parameters"]
    assert (told["init"], told["strength"], told["width"], told["height"]) == ("photo.png", 0.5, 112, 96)
    assert "Size: 100x90" in text and "init: photo.png" in text and "strength: 0.5" in text
    assert trace["init"].shape == (1, 16, 12, 14) and "mask" not in trace
    assert len(trace["sigmas"]) == 2 and "latents.1" not in trace
    with torch.no_grad():
        pixels = torch.from_numpy(np.pad(np.asarray(PHOTO), [(0, 6), (0, 12), (0, 0)], mode="edge").copy())
        expected = pipeline.vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
    assert relative_error(trace["init"], expected) <= 1e-5
    sigma = trace["sigmas"][0]
    start = sigma * trace["noise"] + (1 - sigma) * trace["init"]
    assert relative_error(trace["latents.0"], start - sigma * trace["velocity.0"]) <= 1e-5


def test_strength_0_is_the_picture_and_1_is_none_of_it(pipeline: Pipeline) -> None:
    """At 0 nothing is denoised; at 1 it is the picture that is drawn without init."""
    trace = traced(pipeline, init=PHOTO, strength=0.0)
    assert not [name for name in trace if name.startswith("velocity")]
    assert np.array_equal(trace["image"][0], pipeline.decode(trace["init"])[0][:90, :100])
    other = PHOTO.resize((112, 96))
    assert np.array_equal(drawn(pipeline, init=other, strength=1), drawn(pipeline, width=112, height=96))


def test_a_batch_is_its_singles(pipeline: Pipeline) -> None:
    together = pipeline("a horse", init=PHOTO, mask=MASK, count=2, seed=4, **FEW)
    for i, image in enumerate(together):
        assert np.abs(array(image) - drawn(pipeline, init=PHOTO, mask=MASK, seed=4 + i)).max() <= 1
    assert np.abs(array(together[0]) - array(together[1])).max() > 1


# ---- masks ---------------------------------------------------------------------------------------


def test_where_the_mask_is_black_every_pixel_is_the_originals(
    files: Path, capfd: pytest.CaptureFixture, pipeline: Pipeline
) -> None:
    """With soft edges too; what is not black is drawn. --mask-edges latent has the autoencoder's picture there."""
    arguments = ["a horse", "--init", "photo.png", "--mask", "mask.png", "--mask-blur", "3", "--out", "m.png"]
    assert run(capfd, *arguments).code == 0
    found, original = array(files / "m.png"), array(PHOTO)
    free = np.asarray(MASK.filter(ImageFilter.GaussianBlur(3))) > 0
    assert np.array_equal(found[~free], original[~free]) and 40 * 30 < free.sum() < 60 * 50
    assert (found[free] != original[free]).mean() > 0.9
    latent = drawn(pipeline, init=PHOTO, mask=MASK, mask_blur=3, mask_edges="latent")
    assert np.abs(latent[free] - found[free]).max() <= 1
    assert (latent[~free] != original[~free]).mean() > 0.5
    assert np.abs(latent[~free] - original[~free]).mean() < 30


def test_a_grey_is_a_strength_of_its_own(pipeline: Pipeline) -> None:
    """Cells are held at the right noise level until the share of the steps that their grey leaves; white never."""
    levels = [0, 51, 128, 204, 255]
    mask = Image.fromarray(np.repeat(np.repeat(np.array([levels], np.uint8), 16, 0), 16, 1))  # (16, 80)
    photo = PHOTO.resize((80, 16))
    trace = traced(pipeline, init=photo, mask=mask, steps=5)
    assert trace["mask"].shape == (1, 1, 2, 10)
    assert torch.equal(trace["mask"][0, 0, 0, ::2], torch.tensor(levels) / 255)
    held = {0: 5, 51: 3, 128: 2, 204: 0, 255: 0}  # steps of 5 after which it is not free: k < 5 (1 - grey / 255)
    for i in range(5):
        sigma = trace["sigmas"][i + 1]
        expected = sigma * trace["noise"] + (1 - sigma) * trace["init"]
        for column, level in enumerate(levels):
            cells = (slice(None), slice(None), slice(None), slice(2 * column, 2 * column + 2))
            same = torch.allclose(trace[f"latents.{i}"][cells], expected[cells], atol=1e-6)
            assert same == (i < held[level]), (i, level)
    assert torch.equal(trace["latents.4"][..., :2], trace["init"][..., :2])


def test_a_region_is_drawn_at_full_size_and_put_back(files: Path, capfd: pytest.CaptureFixture) -> None:
    """What is drawn is the mask with its margin, by its shape, of as many pixels as the model's default."""
    arguments = ["a horse", "--init", "photo.png", "--mask", "mask.png", "--mask-crop", "5"]
    assert run(capfd, *arguments, "--out", "r.png", "--dump", "r.safetensors").code == 0
    found, original, free = array(files / "r.png"), array(PHOTO), np.asarray(MASK) > 0
    assert np.array_equal(found[~free], original[~free])
    assert (found[free] != original[free]).mean() > 0.9
    trace = load_file(files / "r.safetensors")
    assert trace["noise"].shape[2:] == (14, 18)  # 50x40 at 128^2 pixels: 143x114
    assert trace["image"].shape == (1, 90, 100, 3)
    with Image.open(files / "r.png") as image:
        assert "Size: 100x90" in image.text["parameters"]
    assert (
        run(capfd, *arguments, "--width", "64", "--height", "64", "--mask-edges", "latent", "--out", "l.png").code == 0
    )
    box = np.zeros((90, 100), bool)
    box[10:60, 25:75] = True  # as wide as high
    found = array(files / "l.png")
    assert np.array_equal(found[~box], original[~box]) and (found[box & ~free] != original[box & ~free]).mean() > 0.5


def test_outpainting(files: Path, capfd: pytest.CaptureFixture) -> None:
    """The original in its place, to the bit; what is around it is new."""
    assert run(capfd, "a horse", "--init", "photo.png", "--outpaint", "0,10,20,0", "--out", "o.png").code == 0
    found = array(files / "o.png")
    assert found.shape == (100, 120, 3) and np.array_equal(found[10:, :100], array(PHOTO))
    assert found[:10].std() > 1 and (np.diff(found[50, 100:], axis=0) != 0).any()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fitting_from_the_command_line(files: Path, capfd: pytest.CaptureFixture, fit: str) -> None:
    """With strength 0, so that one sees what was encoded: a picture twice as wide as high, of two halves."""
    halves = Image.new("RGB", (128, 64), "white")
    halves.paste("black", (0, 0, 64, 64))
    halves.save(files / "halves.png")
    size = ["--width", "64", "--height", "64", "--fit", fit]
    assert run(capfd, "a horse", "--init", "halves.png", "--strength", "0", *size, "--out", f"{fit}.png").code == 0
    found = array(files / f"{fit}.png")
    assert found.shape == (64, 64, 3)
    assert found[:, :28].mean() < 60 and found[:, 36:].mean() > 195


# ---- twice, and variations -----------------------------------------------------------------------


def test_upscaling_is_drawing_twice(files: Path, capfd: pytest.CaptureFixture, pipeline: Pipeline) -> None:
    """The second time from the first picture, enlarged by hand."""
    arguments = ["--width", "64", "--height", "48", "--upscale", "1.3", "--upscale-strength", "0.5"]
    assert run(capfd, "a horse", *arguments, "--out", "u.png").code == 0
    found = array(files / "u.png")
    first = pipeline("a horse", width=64, height=48, **FEW)[0]
    larger = first.resize((83, 62), Image.Resampling.LANCZOS)
    assert np.abs(found - drawn(pipeline, init=larger, strength=0.5)).max() <= 1
    with Image.open(files / "u.png") as image:
        told = json.loads(image.text["mmdit"])
        assert "Size: 83x62" in image.text["parameters"]
    assert (told["upscale"], told["upscale_strength"], told["init"], told["width"]) == (1.3, 0.5, None, 64)


def test_variations(files: Path, capfd: pytest.CaptureFixture, pipeline: Pipeline) -> None:
    """Of one picture: the variation's seed counts up, the picture's stays; at 0 and 1 it is the one noise or other."""
    side = ["--width", "64", "--height", "64"]
    arguments = ["a horse", "--seed", "5", "--variation-seed", "9", "--variation-strength", "0.3", "--count", "2"]
    assert run(capfd, *arguments, *side, "--out", "v.png", "--dump", "v.safetensors").code == 0
    noise = load_file(files / "v.safetensors")["noise"].double()
    one, others = pipeline.noise(64, 64, [5]).double(), pipeline.noise(64, 64, [9, 10]).double()
    for i in range(2):
        angle = math.acos(float((one * others[i]).sum() / (one.norm() * others[i].norm())))
        expected = math.sin(0.7 * angle) * one + math.sin(0.3 * angle) * others[i : i + 1]
        assert relative_error(noise[i : i + 1], expected / math.sin(angle)) <= 1e-6
        with Image.open(files / f"v-{i + 1}.png") as image:
            told = json.loads(image.text["mmdit"])
        assert (told["seed"], told["variation_seed"], told["variation_strength"]) == (5, 9 + i, 0.3)
    plain = traced(pipeline, width=64, height=64, seed=5)["noise"]
    for share, expected in ((0, plain), (1, pipeline.noise(64, 64, [9]))):
        more = {"variation_seed": 9, "variation_strength": share}
        assert torch.equal(traced(pipeline, width=64, height=64, seed=5, **more)["noise"], expected)


def test_noise_between_two_keeps_its_length() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 16, 8, 8, generator=draw) for _ in range(2))
    for share in (0.1, 0.5, 0.9):
        assert float(spherical(one, other, share).std()) == pytest.approx(1, abs=0.06)
        assert torch.allclose(spherical(one, one, share), one, atol=1e-6)
        alone = torch.cat([spherical(one[i : i + 1], other[i : i + 1], share) for i in range(2)])
        assert torch.equal(spherical(one, other, share), alone)


# ---- lists, identity -----------------------------------------------------------------------------


def test_in_a_list_and_what_is_drawn_again(files: Path, capfd: pytest.CaptureFixture) -> None:
    """What the pictures hold counts, not their names: moved, it is there already; changed, it is drawn."""
    lines = [{"prompt": "a horse", "init": "photo.png", "mask": "mask.png"},
             {"prompt": "a bear", "init": "photo.png", "strength": 0.5}]  # fmt: skip

    def drawn_of() -> tuple[int, str]:
        (files / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
        ran = run(capfd, "--prompts", "list.jsonl", "--out", "out")
        assert ran.code == 0
        return len(ran.lines), next(line for line in ran.errors if "skipped" in line)

    assert drawn_of()[0] == 2
    (files / "photo.png").rename(files / "moved.png")
    lines[0]["init"] = lines[1]["init"] = "moved.png"
    count, told = drawn_of()
    assert (count, told[:9]) == (0, "0 written") and "2 skipped" in told
    MASK.point(lambda v: 255 - v).save(files / "mask.png")
    assert drawn_of()[0] == 1


def test_settled_settings_stay_as_they_are(pipeline: Pipeline) -> None:
    """Checked again, as a result's settings are, nothing changes; and the sizes by hand."""
    defaults = {"width": 128, "height": 128}
    for given, drawn_at, result in (
        ({}, (112, 96), (100, 90)), ({"width": 64}, (64, 64), (64, 64)), ({"height": 48}, (48, 48), (48, 48)),
        ({"width": 96, "height": 64}, (96, 64), (96, 64)), ({"outpaint": "0,0,12,6"}, (112, 96), (112, 96)),
        ({"outpaint": "5,0,0,6"}, (112, 96), (105, 96)),
        ({"outpaint": "0,0,32,0", "width": 128, "height": 96}, (128, 96), (128, 96)),
        ({"mask": MASK, "mask_crop": 5}, (144, 112), (100, 90)), ({"upscale": 1.5}, (112, 96), (150, 135)),
        ({"init": PHOTO.resize((400, 200))}, (192, 96), (181, 91)),
    ):  # fmt: skip
        s = settled(Settings("x", **{"init": PHOTO, **given}), defaults, 16)
        assert ((s.width, s.height), result_size(s)) == (drawn_at, result), given
        assert settled(s, defaults, 16) == s
    s = replace(Settings("x", init=PHOTO), **{k: v for k, v in SD35_MEDIUM_DEFAULTS.items() if k == "steps"})
    assert [steps_of(replace(s, **more)) for more in ({}, {"mask": MASK}, {"strength": 0.25}, {"init": None})] == [
        17, 28, 7, 28,
    ]  # fmt: skip
    assert [(s.seed, s.variation_seed) for s in alone(Settings("x", seed=3, variation_seed=8, count=2))] == [
        (3, 8), (3, 9),
    ]  # fmt: skip
    one, other = (pipeline.check(replace(pipeline.settings, init=image)) for image in (PHOTO, MASK))
    assert one.images != other.images and one.strength == 0.6


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--mask", "mask.png"], "mask is 'mask.png', but init is not given"),
    (["--init", "photo.png", "--mask", "other.png"], "mask: other.png: is 50x45, but init is 100x90"),
    (["--init", "photo.png", "--strength", "1.5"], "strength is 1.5: expected a number from 0 to 1"),
    (["--init", "photo.png", "--strength", "-0.1"], "strength is -0.1: expected a number from 0 to 1"),
    (["--init", "photo.png", "--strength", "nan"], "strength is nan: expected a number"),
    (["--init", "none.png"], "init: none.png: No such file or directory"),
    (["--init", "list.txt"], "init: list.txt: is no PNG, JPEG or WebP, or is damaged"),
    (["--init", "half.png"], "init: half.png: is damaged"),
    (["--init", "bomb.png"], "init: bomb.png: is 60000x60000: expected at most 67108864 pixels"),
    (["--init", "photo.png", "--mask", "bomb.png"], "mask: bomb.png: is 60000x60000"),
    (["--init", "photo.png", "--mask", "black.png", "--mask-crop", "3"], "mask: black.png: is black"),
    (["--init", "photo.png", "--outpaint", "1,2,3"], "outpaint is '1,2,3': expected LEFT,TOP,RIGHT,BOTTOM"),
    (["--init", "photo.png", "--outpaint", "64,0,64,0", "--width", "128", "--height", "96"], "leave room within"),
    (["--init", "photo.png", "--outpaint", "8000,0,0,0"], "width 8112 is more than the model's table"),
    (["--upscale", "8"], "width 1024 is more than the model's table"),
    (["--upscale", "1"], "upscale is 1.0: expected a number above 1"),
    (["--variation-seed", "1"], "variation_seed is 1, but variation_strength is not given"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    files: Path, capfd: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    MASK.resize((50, 45)).save(files / "other.png")
    Image.new("L", PHOTO.size).save(files / "black.png")
    whole = (files / "photo.png").read_bytes()
    (files / "list.txt").write_text("a horse\n")
    (files / "half.png").write_bytes(whole[: len(whole) // 2])
    bomb = whole[:16] + (60000).to_bytes(4, "big") * 2 + whole[24:]
    (files / "bomb.png").write_bytes(bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:])
    before = sorted(files.iterdir())
    ran = run(capfd, "a horse", *arguments)
    assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1), ran
    assert message in ran.errors[0]
    assert sorted(files.iterdir()) == before


def test_a_line_of_a_list_is_named(files: Path, capfd: pytest.CaptureFixture) -> None:
    (files / "list.jsonl").write_text('{"prompt": "a horse"}\n{"prompt": "a bear", "init": "none.png"}\n')
    ran = run(capfd, "--prompts", "list.jsonl")
    assert ran.code == 2 and len(ran.errors) == 1 and not (files / "out").exists()
    assert "list.jsonl: line 2: init: none.png: No such file or directory" in ran.errors[0]


def test_what_python_gives_is_checked(pipeline: Pipeline) -> None:
    for given in (7, b"x", np.zeros((4, 4, 3)), ["a.png"]):
        with pytest.raises(SettingsError, match=r"init is .*: expected text"):
            pipeline("a horse", init=given, **FEW)


# ---- memory --------------------------------------------------------------------------------------


def test_encoding_is_a_stage_of_the_plan(pipeline: Pipeline) -> None:
    """Only where a picture is encoded, within the budget; in strips its latents are the same within rounding."""
    s = pipeline.check(replace(pipeline.settings, prompt="x", init=PHOTO.resize((128, 128)), **FEW))
    job, plain = pipeline.job(s), pipeline.job(pipeline.check(replace(pipeline.settings, prompt="x", **FEW)))
    assert job.init and not plain.init
    plan, without = pipeline.plan_for(job), pipeline.plan_for(plain)
    assert "init" in plan.stages and "init" not in without.stages and "; init " in str(plan)
    planner, modes = pipeline.planner, dict.fromkeys(plan.modes, Mode.STAGED)
    whole = planner.predict(modes, job, 1, 10**12)
    assert whole.init_strip is None
    least = planner.predict(modes, job, 1, 0)
    assert least.init_strip == 1 and least.peaks["init"] < whole.peaks["init"]
    expected = traced(pipeline, init=PHOTO.resize((128, 128)), strength=0.5)
    kept = pipeline.plan_for
    try:
        pipeline.plan_for = lambda _: replace(plan, init_strip=3)
        found = traced(pipeline, init=PHOTO.resize((128, 128)), strength=0.5)
    finally:
        pipeline.plan_for = kept
    assert 0 < relative_error(found["init"], expected["init"]) <= 1e-5
    smaller = planner.smaller(job, whole, "init")
    assert smaller is not None and smaller.peaks["init"] < whole.peaks["init"]
