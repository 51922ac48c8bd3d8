"""The command line: its options, the files it writes, what it reports, and how every mistake ends."""

import errno
import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import Ran

import mmdit.driver.loading
from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.run import main, settle

ROOT = Path(__file__).parents[1]
VOCABULARIES = {"clip_vocab": 1024, "t5_vocab": 512}
DEFAULTS = {"width": 64, "height": 48, "steps": 2, "cfg": 4.5, "t5_length": 40}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in both layouts, toy/ and toy.safetensors, and tokenizers/. Not to be written to."""
    root = tmp_path_factory.mktemp("toys")
    write_tokenizers(root / "tokenizers", captions=2000)
    write_checkpoint(root / "toy", tokenizers=root / "tokenizers", defaults=DEFAULTS, **VOCABULARIES)
    write_checkpoint(root / "toy.safetensors", layout="single-file", **VOCABULARIES)
    return root


class Desk:
    """A place to run the command line in; pictures go to `out`."""

    def __init__(self, toys: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.single, self.tokenizers = (toys / name for name in ("toy", "toy.safetensors", "tokenizers"))
        self.folder, self.out, self.capsys = folder, folder / "out", capsys

    def run(self, prompt: str, *options: object, out: Path | None = None) -> Ran:
        """In this process, with the toy unless the options name a model."""
        told = [str(option) for option in options]
        model = [] if "--model" in told else ["--model", str(self.model)]
        try:
            code = main([prompt, *model, "--dtype", "fp32", "--device", "cpu", "--out", str(out or self.out), *told])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = self.capsys.readouterr()
        return Ran(code, captured.out.splitlines(), captured.err.splitlines())

    def refusal(self, *options: object, prompt: str = "a horse") -> str:
        """The one line that a run is refused with; nothing else is said or written."""
        before = set(self.folder.rglob("*"))
        ran = self.run(prompt, *options)
        assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1), ran
        assert ran.errors[0].startswith("error: ")
        assert set(self.folder.rglob("*")) == before
        return ran.errors[0]

    def files(self) -> list[str]:
        return sorted(p.name for p in self.out.iterdir()) if self.out.exists() else []


@pytest.fixture
def desk(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(toys, tmp_path, capsys)


# ---- options -------------------------------------------------------------------------------------


# ---- what is written -----------------------------------------------------------------------------


def test_as_a_process(desk: Desk) -> None:
    """python -m mmdit.run: exit codes, a silent standard error, the report, and one line for a mistake."""
    command = [sys.executable, "-m", "mmdit.run", "a horse", "--model", desk.model, "--out", desk.out]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.splitlines()) == (0, [str(desk.out / "a-horse-0.png")])
    assert ran.stderr.endswith(" s in all\n") and ran.stderr.count("\n") == 1
    ran = subprocess.run([*command, "--steps", "0"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: steps is 0: expected a whole number from 1\n"
    assert desk.files() == ["a-horse-0.png"]


def test_the_report_and_the_dump(desk: Desk) -> None:
    """Written paths, then the seconds of every stage and in all; the dump against a run from Python and the PNGs."""
    dump = desk.folder / "run.safetensors"
    ran = desk.run("a horse", "--count", 2, "--dump", dump)
    assert (ran.code, len(ran.errors)) == (0, 1)
    assert ran.lines == [str(desk.out / "a-horse-0.png"), str(desk.out / "a-horse-1.png"), str(dump)]
    stages = ("import", "load", "encode", "denoise", "decode", "save")
    pattern = ", ".join(rf"{stage} (\d+\.\d\d) s" for stage in stages) + r"; (\d+\.\d\d) s in all"
    match = re.fullmatch(pattern, ran.errors[-1])
    assert match, ran.errors[-1]
    *parts, whole = map(float, match.groups())
    assert sum(parts) <= whole + 0.005 * (len(parts) + 1)  # each is rounded
    trace: dict[str, Tensor] = {}
    settings = Settings("a horse", model=str(desk.model), dtype="fp32", device="cpu", count=2)
    Pipeline.from_settings(settings).run(settings, trace)
    written = load_file(dump)
    assert written.keys() == trace.keys()
    assert [name for name in written if not torch.equal(written[name], trace[name])] == []
    for path, pixels in zip(ran.lines, written["image"]):
        with Image.open(path) as picture:
            assert torch.equal(pixels, torch.from_numpy(np.array(picture)))


def test_names_in_a_folder(desk: Desk) -> None:
    """After prompt and seed; nothing is replaced."""
    assert desk.run("A *Horse*, on/a  hill!", "--seed", 7, "--count", 2).code == 0
    first = (desk.out / "a-horse-on-a-hill-7.png").read_bytes()
    assert desk.run("a horse on a hill", "--seed", 7).code == 0
    assert desk.files() == ["a-horse-on-a-hill-7-2.png", "a-horse-on-a-hill-7.png", "a-horse-on-a-hill-8.png"]
    assert (desk.out / "a-horse-on-a-hill-7.png").read_bytes() == first
    assert desk.run("", "--seed", -1, "--out", desk.out / "below" / "deep").code == 0
    assert [p.name for p in (desk.out / "below" / "deep").iterdir()] == ["picture--1.png"]
    assert desk.run("馬 " + "horse " * 50).code == 0
    assert len(next(p for p in desk.files() if p.startswith("馬-horse")).encode()) <= 120 + len("-0.png")


def test_names_of_files(desk: Desk) -> None:
    """A name in .png is the file, and is replaced; several get numbers, the first is the single one within rounding."""
    out = desk.out / "x.PNG"
    assert desk.run("a horse", out=out).lines[0] == str(out)
    first = out.read_bytes()
    assert desk.run("a bear", "--count", 3, "--dtype", "fp32", out=out).code == 0
    assert desk.files() == ["x-1.PNG", "x-2.PNG", "x-3.PNG", "x.PNG"]
    assert out.read_bytes() == first
    assert desk.run("a bear", "--dtype", "fp32", out=out).code == 0
    assert out.read_bytes() != first
    with Image.open(out) as replaced, Image.open(desk.out / "x-1.PNG") as numbered:
        assert np.abs(np.asarray(replaced, int) - np.asarray(numbered, int)).max() <= 1


@pytest.mark.parametrize("negative", ["", "a pig: blue, 馬"])
def test_the_settings_are_in_the_picture(desk: Desk, negative: str) -> None:
    """`mmdit` holds all settings, which draw the same picture again; `parameters` is as picture tools read it."""
    prompt = 'a horse, "red"\nand ü'
    ran = desk.run(prompt, "--negative", negative, "--count", 2, "--seed", 7)
    with Image.open(ran.lines[1]) as picture:
        assert (picture.size, picture.mode, picture.format) == ((64, 48), "RGB", "PNG")
        pixels, parameters, own = np.asarray(picture), picture.text["parameters"], json.loads(picture.text["mmdit"])
    model = str(desk.model)
    expected = Settings(
        prompt, negative, model=model, seed=8, dtype="fp32", device="cpu", out=str(desk.out), **DEFAULTS
    )
    weights = own["weights"]
    assert own == json.loads(json.dumps(asdict(replace(expected, weights=weights))))
    again = Pipeline.from_settings(Settings(**own)).run(Settings(**own)).images[0]
    assert int(np.abs(np.asarray(again, dtype=int) - pixels).max()) <= 1
    # The reading of AUTOMATIC1111's web UI: `parse_generation_parameters` and its pattern.
    *text, last = parameters.split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert "\n".join(text) == prompt + (f"\nNegative prompt: {negative}" if negative else "")
    read = dict(pairs)
    assert re.fullmatch(r"mmdit( \d+\.\d+\.\d+)?", read.pop("Version"))
    assert read == {
        "Steps": "2", "Sampler": "Euler", "CFG scale": "4.5", "Seed": "8", "Size": "64x48", "Model": "toy",
        "Schedule type": "Normal", "t5_length": "40", "dtype": "fp32", "device": "cpu", "weights": weights,
    }  # fmt: skip


def test_a_long_prompt_is_a_warning(desk: Desk) -> None:
    """It quotes what was lost, by whom, and the picture is drawn."""
    ran = desk.run("horse " * 50 + "and a bear " * 10 + "fish", "--t5-length", 512)
    assert (ran.code, len(ran.errors), len(desk.files())) == (0, 2, 1)
    assert ran.errors[0].startswith("warning: prompt too long for the 77 tokens of CLIP-L and CLIP-G, which lost ")
    assert ran.errors[0].endswith('bear fish": --long-prompts reads all of it')


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "--width 100": "width 100 is not a multiple of 16: the nearest are 96 or 112",
    "--height 8": "height 8 is not a multiple of 16: the nearest are 16",
    "--width 528": "width 528 is more than the model's table of positions allows: 512 at most",
    "--cfg-interval 0.9:0.2": "cfg_interval is '0.9:0.2': expected LOW:HIGH, shares from 0 to 1",
    "--attention cudnn": "attention cudnn cannot be used: it needs a CUDA device, this is cpu",
    "--steps 0": "steps is 0",
    "--count 0": "count is 0",
    "--cfg nan": "cfg is nan",
    "--seed 18446744073709551616": "seed is",
    "--t5-length 0": "t5_length is 0",
    "--t5-length 1": "t5_length is 1",  # has no room for a prompt before the token that ends it
    "--t5-length 513": "t5_length is 513",
    "--stepz 3": "--stepz",
    "--steps many": "--steps: invalid int value: 'many'",
    "--t5 maybe": "--t5: invalid choice: 'maybe'",
    "--seed": "--seed: expected one argument",
    "--dump run.pt": "dump is 'run.pt': expected a name ending in .safetensors",
    "--model none": "none: no such file",
    "--model ~nosuchuser/x": "~nosuchuser/x: Could not determine home directory",
    f"--model {'x' * 300}": "File name too long",
    "--tokenizers ~nosuchuser/x": "tokenizers: ~nosuchuser/x: Could not determine home directory",
    "--dump ~nosuchuser/x.safetensors": "dump: ~nosuchuser/x.safetensors: Could not determine home directory",
    "--device cuda": "device cuda is not available here: there is",
    "--tokenizers none": "none/tokenizer: no such folder",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistaken_options(desk: Desk, options: str) -> None:
    """Exit code 2, one line that names the option, nothing written."""
    if options == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert MISTAKES[options] in desk.refusal(*options.split())


def test_a_prompt_that_is_no_text(desk: Desk) -> None:
    """Bytes of a command line that are not UTF-8, in either prompt and whether or not it is used."""
    assert "not valid Unicode" in desk.refusal(prompt="a \udcff horse")
    assert "not valid Unicode" in desk.refusal("--negative", "\udcff")
    assert "not valid Unicode" in desk.refusal("--negative", "\udcff", "--cfg", 1)


def test_where_nothing_can_be_written(desk: Desk) -> None:
    """Below a regular file, onto a folder, with too long a name; found before the model is opened."""
    file = desk.folder / "file"
    file.write_text("kept")
    for out in (file / "out", file / "out" / "x.png", file):
        assert f"error: out: cannot write into {file}" in desk.refusal("--model", "none", "--out", out)
    assert f"dump: cannot write into {file}" in desk.refusal("--model", "none", "--dump", file / "a.safetensors")
    (desk.folder / "x.png").mkdir()
    assert "x.png is a folder" in desk.refusal("--model", "none", "--out", desk.folder / "x.png")
    assert "File name too long" in desk.refusal("--model", "none", "--out", desk.folder / ("x" * 300 + ".png"))
    assert file.read_text() == "kept"


def test_broken_single_files(desk: Desk) -> None:
    """Each kind of file that is no model is named for what it is."""
    whole, bad = desk.single.read_bytes(), desk.folder / "bad.safetensors"
    for content, message in (
        (whole[:-1], "truncated"), (whole[:100], "truncated"), (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00.more", "pickles are never opened"), (b"PK\x03\x04 a zip", "pickles are never opened"),
        (b"garbage garbage", "not a safetensors file"),
    ):  # fmt: skip
        bad.write_bytes(content)
        assert message in desk.refusal("--model", bad)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, bad)
    assert "a FLUX model" in desk.refusal("--model", bad)


Change = Callable[[dict[str, Tensor]], None]


def changed(desk: Desk, change: Change, part: str = "transformer") -> Path:
    """A copy of the toy's folder with this component's tensors changed."""
    folder = Path(shutil.copytree(desk.model, desk.folder / "changed"))
    (path,) = (folder / part).glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return folder


BIAS = "context_embedder.bias"


@pytest.mark.parametrize(("message", "change"), [
    ("1 missing: context_embedder.bias", lambda t: t.pop(BIAS)),
    ("1 unexpected: extra", lambda t: t.update(extra=torch.zeros(1))),
    ("1 of the wrong shape: context_embedder.bias [2] ", lambda t: t.update({BIAS: torch.zeros(2)})),
    ("context_embedder.bias is I64", lambda t: t.update({BIAS: torch.zeros(128).long()})),
])  # fmt: skip
def test_tensors_that_do_not_fit(desk: Desk, change: Change, message: str) -> None:
    assert message in desk.refusal("--model", changed(desk, change))


@pytest.mark.parametrize("name", ["pos_embed", "x_embedder.proj.weight", "context_embedder.weight"])
@pytest.mark.parametrize("shape", [None, (4,), (2, 3)])
def test_single_files_that_tell_no_config(desk: Desk, name: str, shape: tuple[int, ...] | None) -> None:
    """Without the tensor that a size is read from, or with one of another shape."""
    tensors, key = load_file(desk.single), f"model.diffusion_model.{name}"
    del tensors[key]
    save_file(tensors if shape is None else {**tensors, key: torch.zeros(shape)}, desk.folder / "bad.safetensors")
    desk.refusal("--model", desk.folder / "bad.safetensors", "--tokenizers", desk.tokenizers)


@pytest.mark.parametrize(("part", "key", "value"), [
    ("transformer", "num_layers", "two"), ("transformer", "num_attention_heads", 0), ("transformer", "patch_size", -1),
    ("vae", "block_out_channels", [32, "x"]), ("vae", "norm_num_groups", 0), ("text_encoder", "num_attention_heads", 0),
    ("text_encoder_3", "d_model", None),
])  # fmt: skip
def test_configs_without_sense(desk: Desk, part: str, key: str, value: object) -> None:
    folder = Path(shutil.copytree(desk.model, desk.folder / "changed"))
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    desk.refusal("--model", folder)


def test_parts_that_do_not_fit_together(desk: Desk) -> None:
    """Each whole by itself: CLIP-L in the place of CLIP-G, and tokenizers with more tokens than CLIP has rows."""
    twice = Path(shutil.copytree(desk.model, desk.folder / "twice"))
    shutil.rmtree(twice / "text_encoder_2")
    shutil.copytree(twice / "text_encoder", twice / "text_encoder_2")
    sizes = {"clip_vocab": 96, "t5_vocab": 512, "defaults": DEFAULTS}
    few = write_checkpoint(desk.folder / "few", tokenizers=desk.tokenizers, **sizes)
    for model in (twice, few):
        desk.refusal("--model", model)


# ---- failures on the way -------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "tensor", "stage"), [
    ("transformer", BIAS, "the latents after step 1 of 2"),
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.bias", "CLIP's context"),
    ("text_encoder_2", "text_projection.weight", "CLIP's pooled vector"),
    ("text_encoder_3", "encoder.final_layer_norm.weight", "T5's context"),
    ("vae", "decoder.conv_out.bias", "the decoded picture"),
])  # fmt: skip
def test_nan_names_its_stage(desk: Desk, part: str, tensor: str, stage: str) -> None:
    """One NaN in the weights: the message says where it showed, and neither picture nor dump is written."""
    folder = changed(desk, lambda tensors: tensors[tensor].view(-1)[:1].fill_(torch.nan), part)
    told = desk.refusal("--model", folder, "--dump", desk.folder / "run.safetensors")
    assert told.startswith(f"error: {stage}: NaN or infinity; the weights may be damaged: compare with another copy")


@pytest.mark.parametrize("where", ["load_parts", "encode", "decode"])
def test_an_interrupt(desk: Desk, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Exit code 130, one line, and nothing left behind."""
    place = {"load_parts": mmdit.driver.loading, "encode": Pipeline, "decode": Pipeline}[where]
    monkeypatch.setattr(place, where, Mock(side_effect=KeyboardInterrupt))
    ran = desk.run("a horse", "--out", desk.folder / "deep" / "out")
    assert ran == (130, [], ["interrupted: nothing more was written"])
    assert list(desk.folder.iterdir()) == []


def test_a_disk_that_fills_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a picture is written, then there is no room: one line, and neither file nor folder is left."""

    def save(_: Image.Image, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert "No space left on device" in desk.refusal()
    assert list(desk.folder.iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_unknown_tensors_are_one_warning(desk: Desk) -> None:
    """A file with tensors that no part has: a line on standard error, and the picture."""
    save_file({**load_file(desk.single), "extra.weight": torch.zeros(1)}, desk.folder / "more.safetensors")
    size = ("--width", 64, "--height", 64, "--steps", 1, "--tokenizers", desk.tokenizers)
    ran = desk.run("a horse", "--model", desk.folder / "more.safetensors", *size)
    assert (ran.code, [line[:7] for line in ran.errors], desk.files()) == (0, ["warning", "import "], ["a-horse-0.png"])


def test_a_file_is_replaced_whole_or_not_at_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the last step: the file that was there stays as it was."""
    out = desk.out / "x.png"
    out.parent.mkdir(parents=True)
    out.write_bytes(b"kept")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    told = desk.run("a horse", out=out)
    assert told.code == 2
    assert out.read_bytes() == b"kept"
    assert desk.files() == ["x.png"]


def test_loading_without_the_garbage_collector_ends() -> None:
    """As a program; for others, who call `main`, it stays as it is."""
    before = gc.get_freeze_count()
    settle()
    assert gc.isenabled() and gc.get_freeze_count() == before
    gc.disable()
    settle()
    try:
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
