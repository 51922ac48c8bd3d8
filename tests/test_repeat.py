"""Pictures repeated from what their files say: this program's own, AUTOMATIC1111's and ComfyUI's."""

import json
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.likeness import filled
from mmdit.driver.output import exif_info, png_info
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.repeat import settings_of_picture, texts_in
from mmdit.driver.settings import Settings
from mmdit.run import main, settings_of


def picture(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# ---- this program's own ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    defaults = {"width": 48, "height": 32, "steps": 2, "cfg": 3.0, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("repeat"), defaults=defaults)


@pytest.mark.filterwarnings("default")
def test_a_picture_is_repeated_bit_for_bit(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line and from Python; options come first; the original stays."""

    def run(*options: object) -> tuple[Path, list[str]]:
        assert main([*map(str, options)]) == 0
        told = capsys.readouterr()
        return Path(told.out.strip()), told.err.splitlines()

    first = tmp_path / "a" / "x.png"
    out = ("--out", tmp_path / "b")
    run("a horse", "--negative", "a bear", "--model", toy, "--device", "cpu", "--dtype", "fp32", "--seed", 7,
        "--cfg-interval", "0.1:1", "--out", first)  # fmt: skip
    before = first.read_bytes()
    again, said = run("--from-png", first, *out)
    assert again == tmp_path / "b" / "a-horse-7.png" and len(said) == 1  # the seconds alone
    assert np.array_equal(pixels(again), pixels(first))
    given = {"steps": 3, "seed": 8}
    other, _ = run("--from-png", first, "--steps", 3, "--seed", 8, *out)
    drawn = settings_of_picture(other)[0]
    assert {**settings_of_picture(first)[0], **given} == drawn
    pipe = Pipeline.load(toy, device="cpu", dtype="fp32")
    for path, more in ((again, {}), (other, given)):
        (image,) = pipe.repeat(first, **more)
        assert np.array_equal(np.asarray(image), pixels(path))
    assert first.read_bytes() == before


def test_levels_said_in_another_way(toy: Path, tmp_path: Path) -> None:
    """Steps that are given take the place of levels written out, and these that of steps; also from Python."""
    counted, written = tmp_path / "counted.png", tmp_path / "written.png"
    base = ["a horse", "--model", str(toy), "--device", "cpu", "--dtype", "fp32"]
    assert main([*base, "--steps", "3", "--shift", "2", "--schedule", "karras", "--out", str(counted)]) == 0
    assert main([*base, "--sigmas", "1,0.7,0.3", "--out", str(written)]) == 0
    pipe = Pipeline.load(toy, device="cpu", dtype="fp32")
    for path, words, more, told in (
        (counted, ["--sigmas", "1,0.5"], {"sigmas": "1,0.5"}, (2, "1.0,0.5", None, "normal")),
        (written, ["--steps", "2"], {"steps": 2}, (2, None, None, "normal")),
    ):
        out = tmp_path / f"again-{path.name}"
        assert main(["--from-png", str(path), *words, "--out", str(out)]) == 0
        s = Settings(**settings_of_picture(out)[0])
        assert (s.steps, s.sigmas, s.shift, s.schedule) == told
        assert np.array_equal(np.asarray(pipe.repeat(path, **more)[0]), pixels(out))


@pytest.mark.filterwarnings("default")
def test_other_weights_are_told(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are others than those that drew it; not where the command line names a model."""
    own = {"prompt": "a horse", "model": str(toy), "dtype": "fp32", "weights": "others", "count": 1, "t5": "off"}
    path = picture(tmp_path / "x.png", mmdit=json.dumps(own))
    assert main(["--from-png", str(path), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {path} was drawn by other weights\n")
    assert main(["--from-png", str(path), "--out", str(tmp_path), "--model", str(toy)]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    pipe = Pipeline.load(toy, dtype="fp32")
    with pytest.warns(UserWarning, match="x.png: left out: t5 off, other weights$"):
        pipe.repeat(path)


def test_what_comes_from_the_file(tmp_path: Path) -> None:
    """All of the picture, nothing of where it went; what is unknown is named; the command line comes first."""
    own = {"prompt": "a horse", "seed": 5, "lora": ["a:0.5", "b"], "cfg": 2, "out": "x.png", "dump": "d", "preview": 3,
           "sparkle": 7, "from_png": "y.png"}  # fmt: skip
    path = picture(tmp_path / "x.png", mmdit=json.dumps(own), parameters="never\nSteps: 99, Seed: 1, Size: 8x8")
    found, left_out = settings_of_picture(path)
    assert found == {"prompt": "a horse", "seed": 5, "lora": ("a:0.5", "b"), "cfg": 2}
    assert left_out == ["sparkle 7"]
    arguments = ["--from-png", str(path)]
    assert settings_of(arguments) == Settings("a horse", seed=5, lora=("a:0.5", "b"), cfg=2, from_png=str(path))
    changed = settings_of([*arguments, "a bear", "--lora", "c", "--cfg", "1", "--compile"])
    assert changed == Settings("a bear", seed=5, lora=("c",), cfg=1, compile=True, from_png=str(path))


MISTAKES: dict[str, tuple[bytes | dict[str, str], str]] = {
    "no text": ({}, "says nothing of how it was drawn: expected a picture of this program"),
    "other text": ({"parameters": "a horse", "prompt": "[1]", "workflow": "{}"}, "says nothing of how it was drawn"),
    "no picture": (b"a horse", "no PNG, JPEG or WebP that can be read"),
    "nothing": (b"", "no PNG, JPEG or WebP that can be read"),
    "no JSON": ({"mmdit": "{"}, "its settings are not JSON"),
    "a list": ({"mmdit": "[1]"}, "its settings are no JSON object"),
    "a word for a number": ({"mmdit": '{"steps": "many"}'}, "steps is 'many': expected a"),
    "a list for a number": ({"mmdit": '{"steps": [1]}'}, "steps is "),
    "a number for files": ({"mmdit": '{"lora": 5}'}, "lora is 5: expected text"),
    "too many steps": ({"parameters": "x\nSteps: 99999999, Seed: 1, Size: 8x8"}, "steps is 99999999: expected at most"),
    "a seed of no sense": ({"parameters": "x\nSteps: 9, Seed: 1" + 38 * "0" + ", CFG scale: 2"}, "seed is 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_files_of_no_use(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file, exit code 2."""
    content, message = MISTAKES[name]
    path = tmp_path / "x.png"
    path.write_bytes(content) if isinstance(content, bytes) else picture(path, **content)
    assert main(["--from-png", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path}: ") and message in told and told.count("\n") == 1


def test_no_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(SettingsError, match=message):
            settings_of_picture(path)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the head claims: pixels are never decoded, and texts only so far."""
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    text = zlib.compress(b" " * 80_000_000)
    for size, more in (
        ((100_000, 100_000), b""),
        ((13_000, 13_000), b""),
        ((8, 8), chunk(b"zTXt", b"mmdit\0\0" + text)),
    ):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(SettingsError, match=r"x.png: (claims .*pixels|no PNG|says nothing)"):
            settings_of_picture(tmp_path / "x.png")
    own = picture(tmp_path / "y.png", mmdit='{"prompt": "x"}')
    assert settings_of_picture(own) == ({"prompt": "x"}, [])


# ---- AUTOMATIC1111's web UI -------------------------------------------------------------------------

WEBUI = """a horse, <lora:style:0.8> (red:1.2)
on a hill
Negative prompt: a bear,
blurred
Steps: 30, Sampler: Euler, Schedule type: Automatic, CFG scale: 5.5, Seed: 1234567890, Size: 640x512, \
Model hash: 45dee52b, Model: sd3.5_medium, Denoising strength: 0.4, Hires prompt: "a, \\"b\\": c", \
Variation seed: 5, Variation seed strength: 0.25, \
Version: v1.10.1"""
READ = {
    "prompt": "a horse,  (red:1.2)\non a hill", "negative": "a bear,\nblurred", "steps": 30, "cfg": 5.5,
    "seed": 1234567890, "width": 640, "height": 512, "emphasis": True, "rng": "cuda", "variation_seed": 5,
    "variation_strength": 0.25, "sampler": "euler", "schedule": "normal",
}  # fmt: skip
LEFT = ["<lora:style:0.8>", "Model sd3.5_medium", "Denoising strength 0.4", 'Hires prompt a, "b": c']


def without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def test_the_web_ui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = picture(tmp_path / "x.png", parameters=WEBUI)
    found, left_out = settings_of_picture(path)
    assert (found, left_out) == (READ, LEFT)
    settings_of(["--from-png", str(path)])
    assert capsys.readouterr().err == f"{path}: left out: {', '.join(LEFT)}\n"


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-16", "utf-8"])
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_comments(tmp_path: Path, encoding: str, format: str) -> None:
    exif = Image.Exif()
    mark = b"ASCII\0\0\0" if encoding == "utf-8" else b"UNICODE\0"
    exif.get_ifd(0x8769)[0x9286] = mark + WEBUI.replace("hill", "hill 馬").encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / "x", format=format, exif=exif)
    found, _ = settings_of_picture(tmp_path / "x")
    assert found == {**READ, "prompt": READ["prompt"] + " 馬"}


@pytest.mark.parametrize(("format", "most"), [("JPEG", 65_533), ("WEBP", 10**7)])
def test_own_settings_in_other_formats(tmp_path: Path, format: str, most: int) -> None:
    """All of them, as in a PNG; of what does not fit the note goes first, then the comment."""
    image, own = Image.new("RGB", (16, 16)), Settings("a 馬", negative="b", seed=3, slg=2.5, also=("a", "b"))
    image.save(tmp_path / "x.png", pnginfo=png_info(own))
    image.save(tmp_path / "x", format=format, exif=exif_info(own, most))
    assert settings_of_picture(tmp_path / "x") == settings_of_picture(tmp_path / "x.png")
    for length, names in ((10_000, {"comment", "mmdit"}), (14_000, {"comment"}), (40_000, set())):
        exif = exif_info(replace(own, prompt="馬" * length), most)
        image.save(tmp_path / "x", format=format, exif=exif)
        with (tmp_path / "x").open("rb") as file:
            assert texts_in(file, "x").keys() == (names if format == "JPEG" else {"comment", "mmdit"})
        assert len(exif) <= most


@pytest.mark.parametrize(("sampler", "schedule", "expected"), [
    ("Euler", "Automatic", ("euler", "normal")), ("Euler a", "SGM Uniform", ("euler_ancestral", "sgm_uniform")),
    ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")), ("DPM++ 2M", "Beta", ("dpmpp_2m", "beta")),
    ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")), ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
    ("DPM++ 3M SDE Exponential", None, ("dpmpp_3m_sde", "exponential")), ("UniPC", "Simple", ("unipc", "simple")),
    ("LMS", "Uniform", ("lms", "normal")), ("euler_a", "discrete", ("euler_ancestral", "discrete")),
    ("dpm++2m", "karras", ("dpmpp_2m", "karras")), ("DPM fast", "Turbo", None),
])  # fmt: skip
def test_names_of_samplers(
    tmp_path: Path, sampler: str, schedule: str | None, expected: tuple[str, str] | None
) -> None:
    told = "" if schedule is None else f", Schedule type: {schedule}"
    path = picture(tmp_path / "x.png", parameters=f"x\nSteps: 3, Sampler: {sampler}{told}, CFG scale: 2, Seed: 1")
    found, left_out = settings_of_picture(path)
    if expected is None:
        assert left_out == ["Sampler DPM fast", "Schedule type Turbo"] and "sampler" not in found
    else:
        assert ((found["sampler"], found["schedule"]), left_out) == (expected, [])


def test_pictures_of_stable_diffusion_cpp(tmp_path: Path) -> None:
    """They name themselves, and are drawn as it draws."""
    text = "x\nSteps: 3, CFG scale: 2, Seed: 1, RNG: cuda, Sampler: euler normal, Version: stable-diffusion.cpp"
    found, left_out = settings_of_picture(picture(tmp_path / "x.png", parameters=text))
    assert (found["like"], found["rng"], found["t5_length"], left_out) == ("sdcpp", "cuda", 77, [])


def test_a_sampler_that_is_not_here_is_told(tmp_path: Path) -> None:
    path = picture(tmp_path / "x.png", parameters="x\nSteps: 3, Sampler: DPM adaptive, CFG scale: 2, Seed: 1")
    found, left_out = settings_of_picture(path)
    assert without(found, "schedule") == {"prompt": "x", "negative": "", "steps": 3, "cfg": 2, "seed": 1}
    assert left_out == ["Sampler DPM adaptive"]


# ---- ComfyUI ----------------------------------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


PLAIN = {
    "3": node("KSampler", seed=2**63, steps=20, cfg=4.0, sampler_name="dpmpp_2m", scheduler="sgm_uniform", denoise=1.0,
              model=["13", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
    "4": node("CheckpointLoaderSimple", ckpt_name="sd3.5_medium.safetensors"),
    "5": node("EmptySD3LatentImage", width=768, height=512, batch_size=2),
    "6": node("CLIPTextEncode", text="a horse", clip=["4", 1]),
    "7": node("CLIPTextEncode", text=["20", 0], clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", filename_prefix="x", images=["8", 0]),
    "12": node("LoraLoaderModelOnly", lora_name="style.safetensors", strength_model=0.8, model=["4", 0]),
    "13": node("ModelSamplingSD3", shift=2.5, model=["12", 0]),
    "20": node("PrimitiveString", value="a bear"),
}  # fmt: skip
PLAIN_READ = {
    "prompt": "a horse", "negative": "a bear", "seed": 2**63, "steps": 20, "cfg": 4.0, "width": 768, "height": 512,
    "sampler": "dpmpp_2m", "schedule": "sgm_uniform", "shift": "2.5",
}  # fmt: skip
PLAIN_LEFT = [
    "batch_size 2",
    "LoraLoaderModelOnly style.safetensors 0.8",
    "CheckpointLoaderSimple sd3.5_medium.safetensors",
]
CUSTOM = {
    "1": node("RandomNoise", noise_seed=["2", 0]),
    "2": node("Seed", seed=11),
    "3": node("CFGGuider", cfg=3.5, model=["4", 0], positive=["6", 0], negative=["7", 0]),
    "4": node("UNETLoader", unet_name="sd3.5.safetensors"),
    "5": node("KSamplerSelect", sampler_name="res_multistep"),
    "6": node("CLIPTextEncodeSD3", clip_l="a horse", clip_g="a horse", t5xxl="a long horse"),
    "7": node("ConditioningZeroOut", conditioning=["6", 0]),
    "8": node("BasicScheduler", scheduler="beta", steps=12, denoise=0.6, model=["4", 0]),
    "9": node("SamplerCustomAdvanced", noise=["1", 0], guider=["3", 0], sampler=["5", 0], sigmas=["8", 0],
              latent_image=["10", 0]),
    "10": node("VAEEncode", pixels=["11", 0]),
    "11": node("LoadImage", image="x.png"),
    "12": node("PreviewImage", images=["13", 0]),
    "13": node("VAEDecode", samples=["9", 1]),
    "0": node("KSampler", seed=1, steps=1, cfg=1, sampler_name="euler", scheduler="normal", denoise=1),
}  # fmt: skip
CUSTOM_READ = {
    "prompt_clip_g": "a horse",
    "prompt_clip_l": "a horse",
    "prompt": "a long horse",
    "seed": 11,
    "steps": 12,
    "cfg": 3.5,
    "sampler": "res_multistep",
    "schedule": "beta",
}
CUSTOM_LEFT = {
    "denoise 0.6", "ConditioningZeroOut", "UNETLoader sd3.5.safetensors",
    "the picture that it began with (VAEEncode)",
}  # fmt: skip


def test_graphs_of_comfyui(tmp_path: Path) -> None:
    found, left_out = settings_of_picture(picture(tmp_path / "x.png", prompt=json.dumps(PLAIN), workflow="{}"))
    assert (found, left_out) == (filled({**PLAIN_READ, "like": "comfyui"}), PLAIN_LEFT)
    found, left_out = settings_of_picture(picture(tmp_path / "y.png", prompt=json.dumps(CUSTOM)))
    assert (found, {*left_out}) == (filled({**CUSTOM_READ, "like": "comfyui"}), CUSTOM_LEFT)


@pytest.mark.parametrize(("text", "expected"), [
    ("a (red:1.2) horse", {"emphasis": True}), ("a [red] horse", {}), ("horse " * 30, {"long_prompts": True}),
])  # fmt: skip
def test_texts_are_read_as_comfyui_reads_them(tmp_path: Path, text: str, expected: dict[str, bool]) -> None:
    graph = {**PLAIN, "6": node("CLIPTextEncode", text=text)}
    found, _ = settings_of_picture(picture(tmp_path / "x.png", prompt=json.dumps(graph)))
    assert {name: found[name] for name in ("emphasis", "long_prompts") if name in found} == expected


def test_conditions_on_the_way(tmp_path: Path) -> None:
    """ComfyUI's own example for SD3: the negative prompt counts for the first steps, then zeros. That is told."""
    more = {
        "3": {**PLAIN["3"], "inputs": {**PLAIN["3"]["inputs"], "negative": ["30", 0]}},
        "30": node("ConditioningCombine", conditioning_1=["31", 0], conditioning_2=["33", 0]),
        "31": node("ConditioningSetTimestepRange", conditioning=["32", 0], start=0.1, end=1.0),
        "32": node("ConditioningZeroOut", conditioning=["7", 0]),
        "33": node("ConditioningSetTimestepRange", conditioning=["7", 0], start=0.0, end=0.1),
    }
    found, left_out = settings_of_picture(picture(tmp_path / "x.png", prompt=json.dumps({**PLAIN, **more})))
    assert found["negative"] == "a bear"
    assert {"ConditioningCombine", "ConditioningSetTimestepRange", "ConditioningZeroOut"} <= {*left_out}


def test_workflows_of_comfyui(tmp_path: Path) -> None:
    """As its editor has it: nodes with widgets in their order, and links by their numbers."""
    widgets = {
        "KSampler": [2**63, "randomize", 20, 4.0, "dpmpp_2m", "sgm_uniform", 1.0], "CLIPTextEncode": ["a horse"],
        "CheckpointLoaderSimple": ["sd3.5_medium.safetensors"], "EmptySD3LatentImage": [768, 512, 2],
        "LoraLoaderModelOnly": ["style.safetensors", 0.8], "ModelSamplingSD3": [2.5], "PrimitiveString": ["a bear"],
    }  # fmt: skip
    links: list[list[Any]] = []
    nodes = []
    for name, one in PLAIN.items():
        slots = []
        for slot, value in one["inputs"].items():
            if isinstance(value, list):
                links.append([len(links) + 40, int(value[0]), value[1], int(name), len(slots), "X"])
                slots.append({"name": slot, "type": "X", "link": links[-1][0]})
        kind = one["class_type"]
        nodes.append({"id": int(name), "type": kind, "inputs": slots, "widgets_values": widgets.get(kind, [])})
    path = picture(tmp_path / "x.png", workflow=json.dumps({"nodes": nodes, "links": links}))
    assert settings_of_picture(path) == (filled({**PLAIN_READ, "like": "comfyui"}), PLAIN_LEFT)


STRANGE = [None, True, -1, 1.5, "x", [], [1], ["3", 0], [["3"], 0], ["9", 0], {}, {"a": 1}, [None] * 9, 10**30]


def test_strange_graphs(tmp_path: Path) -> None:
    """Any value in the place of any input or node: settings are read, or it is refused on one line."""
    for name, one in PLAIN.items():
        for place in (*one["inputs"], None):
            for value in STRANGE:
                changed = {**one["inputs"], place: value}
                graph = {**PLAIN, name: value if place is None else {**one, "inputs": changed}}
                with suppress(SettingsError):
                    settings_of_picture(picture(tmp_path / "x.png", prompt=json.dumps(graph)))


def test_long_lines_are_read_at_once(tmp_path: Path) -> None:
    """No pattern goes over a text again and again: each of these would take minutes."""
    for text in ("a" * 200_000, " " * 200_000, "a " * 100_000, 'a:"' * 60_000, "<a:" * 60_000 + "\nA: 1, B: 2, C: 3"):
        path = picture(tmp_path / "x.png", parameters=f"x\n{text}")
        with suppress(SettingsError):
            settings_of_picture(path)
    chain = {str(i): node("Reroute", conditioning=[str(i + 1), 0], **{f"x{i}": ["0", 0]}) for i in range(10_000)}
    graph = {**chain, "s": node("KSampler", positive=["0", 0], negative=["0", 0], model=["0", 0])}
    settings_of_picture(picture(tmp_path / "x.png", prompt=json.dumps(graph)))
