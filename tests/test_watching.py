"""Previews, and decoding by TAESD: what is written, when it goes, what it costs the picture."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import randomize
from safetensors.torch import save_file
from toys import Ran, toy_folder

from mmdit.driver import preview
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.repeat import settings_of_picture
from mmdit.driver.settings import identity
from mmdit.run import main
from vae.colours import fitted_colours, least_squares, smooth_noise
from vae.tiny import TinyConfig, TinyDecoder, TinyEncoder

DEFAULTS = {"width": 48, "height": 32, "steps": 5, "cfg": 1.0, "t5_length": 20}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy, and a decoder beside it, taesd.safetensors. Not to be written to."""
    root = tmp_path_factory.mktemp("watching")
    save_file(dict(randomize(TinyDecoder(TinyConfig(8)), seed=1).state_dict()), root / "taesd.safetensors")
    return toy_folder(root, defaults=DEFAULTS)


@pytest.fixture(scope="module")
def pipe(toy: Path) -> Pipeline:
    return Pipeline.load(toy, device="cpu", dtype="fp32")


# ---- colours ---------------------------------------------------------------------------------------


def test_least_squares_are_those_of_numpy() -> None:
    """Odd sizes; and numbers that depend on one another, as where an autoencoder leaves channels unused."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, 7, 3, generator=random)
    latents[:, 4] = latents[:, 0]
    colours = torch.randn(2, 3, 7, 3, generator=random)
    found = least_squares(latents, colours)
    rows = np.concatenate([latents.permute(0, 2, 3, 1).reshape(-1, 5).double(), np.ones((42, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(rows, colours.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy(), rcond=None)
    given = (rows @ expected).reshape(2, 7, 3, 3).transpose(0, 3, 1, 2)
    assert np.abs(found(latents).numpy() - given).max() <= 1e-5
    assert found.weight.abs().max() < 10


def test_a_linear_autoencoder_is_found_exactly() -> None:
    """Latents that are a linear map of the mean colours, and of nothing else: its inverse is the fit."""
    random = torch.Generator().manual_seed(0)
    matrix, shift = torch.randn(6, 3, generator=random), torch.randn(6, generator=random)

    def encode(image: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ck,bkhw->bchw", matrix, F.avg_pool2d(image, 4)) + shift[:, None, None]

    colours = fitted_colours(encode, downscale=4)
    image = smooth_noise(2, 3, 20)
    assert (colours(encode(image)) - F.avg_pool2d(image, 4)).abs().max() <= 1e-4
    assert image.abs().max() <= 1 and image.std() > 0.5


def test_colours_of_the_demo() -> None:
    """Flat shapes of random colours, encoded by the demo's autoencoder: most of what their cells vary is told."""
    demo = Pipeline.load(device="cpu", dtype="fp32")
    random = torch.Generator().manual_seed(3)
    image = torch.zeros(1, 3, 96, 128)
    for _ in range(12):
        top, left = (int(torch.randint(0, side, (), generator=random)) for side in (72, 96))
        image[:, :, top : top + 40, left : left + 40] = 2 * torch.rand(1, 3, 1, 1, generator=random) - 1
    with torch.no_grad():
        error = demo.preview._colours(demo.vae.encode(image)[0]) - F.avg_pool2d(image, 8)
    assert error.pow(2).mean() <= 0.25 * F.avg_pool2d(image, 8).var()


# ---- previews --------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *options: object) -> Ran:
    try:
        code = main([*map(str, options)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    told = capsys.readouterr()
    return Ran(code, told.out.splitlines(), told.err.splitlines())


class Written:
    """What was written as previews, by name, and whether the results were there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, tuple[int, int]]] = []
        save = preview.save_dump

        def save_dump(write: Any, path: Path) -> None:
            save(write, path)
            with Image.open(path) as image:
                image.load()
                self.seen.append((path.name, image.size))
            assert {p.name for p in path.parent.iterdir()} >= {path.name}

        monkeypatch.setattr(preview, "save_dump", save_dump)


@pytest.mark.parametrize("more", [(), ("--taesd", "taesd.safetensors")])
def test_previews(
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    """After steps 2 and 4 of 5, of both pictures, in full size; in the end they are gone; the pictures are the same."""
    monkeypatch.chdir(toy.parent)
    base = ("a horse", "--model", toy, "--dtype", "fp32", "--count", 2)
    assert run(capsys, *base, "--out", tmp_path / "plain").code == 0
    written = Written(monkeypatch)
    ran = run(capsys, *base, "--out", tmp_path / "deep" / "out", "--preview", 2, *more)
    assert (ran.code, len(ran.errors)) == (0, 1)
    assert sorted(written.seen) == [(f"a-horse-{i}.preview.png", (48, 32)) for i in (0, 1) for _ in range(2)]
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == ["a-horse-0.png", "a-horse-1.png"]
    for name in ("a-horse-0.png", "a-horse-1.png"):
        with Image.open(tmp_path / "plain" / name) as plain, Image.open(tmp_path / "deep" / "out" / name) as watched:
            assert np.array_equal(plain, watched)
            assert "preview" not in watched.text["parameters"]


def test_a_preview_goes_with_its_picture(tmp_path: Path) -> None:
    """As soon as that one is drawn; the other picture's stays, and is replaced whole."""
    paths = [tmp_path / "deep" / f"{i}.preview.png" for i in (0, 1)]
    event = Mock(denoised=torch.zeros(1), index=0)
    with preview.Previews(1, paths, lambda _: Image.new("RGB", (8, 8))) as previews:
        for event.index, event.step.index in ((0, 0), (1, 0), (0, 1)):
            previews.step(event)
        assert sorted((tmp_path / "deep").iterdir()) == paths
        previews.picture(event)
        assert [*(tmp_path / "deep").iterdir()] == paths[1:]
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("where", ["step", "decode"])
def test_nothing_is_left(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Broken off by an interrupt, while it denoises or decodes: no preview, and no folder that was made for it."""
    written = Written(monkeypatch)
    if where == "decode":
        monkeypatch.setattr(Pipeline, "decode", Mock(side_effect=KeyboardInterrupt))
    else:
        look = preview.Glance.__call__
        looks = [look, Mock(side_effect=KeyboardInterrupt)]
        monkeypatch.setattr(preview.Glance, "__call__", lambda self, latents: looks.pop(0)(self, latents))
    ran = run(capsys, "a horse", "--model", toy, "--out", tmp_path / "deep" / "out", "--preview", 2)
    assert ran == (130, [], ["interrupted: nothing more was written"])
    assert written.seen and list(tmp_path.iterdir()) == []


def test_a_full_disk(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left on device")))
    ran = run(capsys, "a horse", "--model", toy, "--out", tmp_path / "out", "--preview", 1)
    assert ran.code == 2 and "No space left on device" in ran.errors[0] and list(tmp_path.iterdir()) == []


def test_what_a_preview_may_not_replace(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of this program, drawn before or in the same run, and a folder; what a killed run left, it may."""
    lines = tmp_path / "list.jsonl"
    a, b = tmp_path / "a.png", tmp_path / "a.preview.png"
    lines.write_text(f'{{"prompt": "x", "out": "{a}"}}\n{{"prompt": "y", "out": "{b}"}}\n')
    told = run(capsys, "--prompts", lines, "--model", toy, "--preview", 1)
    assert told.code == 2 and "a.preview.png would be replaced" in told.errors[0] and not a.exists()
    base = ("x", "--model", toy, "--steps", 1)
    assert run(capsys, *base, "--out", b).code == 0
    assert "would be replaced" in run(capsys, *base, "--out", a, "--preview", 1).errors[0]
    b.write_bytes(b"half a preview")
    assert run(capsys, *base, "--out", a, "--preview", 1).code == 0
    assert a.exists() and not b.exists()
    b.mkdir()
    assert "would be replaced" in run(capsys, *base, "--out", a, "--preview", 1).errors[0]


def test_from_python(pipe: Pipeline) -> None:
    """`on_step` gets previews of what it sees, and may stop a picture; `preview` itself is the command line's."""
    seen: list[Image.Image] = []

    def look(event: Any) -> None:
        seen.append(pipe.preview(event.denoised))
        assert event.latents.shape == event.denoised.shape == (1, 16, 4, 6) and 0 < event.sigma <= 1
        if event.settings.seed == 1 and event.step.index == 1:
            event.stop()

    images = pipe("a horse", count=2, on_step=look)
    assert len(images) == 1 and len(seen) == 5 + 2
    assert {image.size for image in seen} == {(48, 32)}
    broken = pipe.preview(torch.full((1, 16, 4, 6), torch.nan))
    assert broken.size == (48, 32)
    with pytest.raises(ValueError, match="preview belongs to the command line"):
        pipe("a horse", preview=2)


# ---- decoding by TAESD -----------------------------------------------------------------------------


def test_decoded_by_taesd(pipe: Pipeline, toy: Path) -> None:
    """The same latents by another decoder; its file tells the pictures apart, and without it nothing does."""
    file = toy.parent / "taesd.safetensors"
    tiny = Pipeline.load(toy, device="cpu", dtype="fp32", taesd=file, taesd_decode=True)
    trace: dict[str, torch.Tensor] = {}
    result = tiny.run(tiny.asked({"prompt": "a horse"}), trace)
    plain: dict[str, torch.Tensor] = {}
    usual = pipe.run(pipe.asked({"prompt": "a horse"}), plain)
    assert torch.equal(trace["latents.4"], plain["latents.4"]) and not torch.equal(trace["image"], plain["image"])
    decoder = randomize(TinyDecoder(TinyConfig(8)), seed=1)
    expected = (decoder(trace["latents.4"]).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    assert int((trace["image"].int() - expected.int()).abs().max()) <= 1
    assert identity(result.settings) != identity(usual.settings)
    seen = Pipeline.load(toy, device="cpu", dtype="fp32", taesd=file)
    assert identity(seen.check(seen.asked({"prompt": "a horse"}))) == identity(usual.settings)
    assert seen.tiny is not None and pipe.tiny is None


def test_a_picture_to_begin_with_is_encoded_by_taesd(toy: Path, tmp_path: Path) -> None:
    """Where there is an encoder; strength 0 leaves what it and the decoder make of the picture."""
    config, root = TinyConfig(8), tmp_path
    encoder, decoder = randomize(TinyEncoder(config), seed=2), randomize(TinyDecoder(config), seed=1)
    save_file(dict(encoder.state_dict()), root / "x_encoder.safetensors")
    save_file(dict(decoder.state_dict()), root / "x_decoder.safetensors")
    pixels = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(root / "init.png")
    tiny = Pipeline.load(
        toy, device="cpu", dtype="fp32", taesd=root / "x_decoder.safetensors", taesd_decode=True
    )  # fmt: skip
    (image,) = tiny("a horse", init=root / "init.png", strength=0.0)
    expected = (decoder(encoder(pixels.permute(2, 0, 1)[None] / 255)).clamp(0, 1) * 255).round()
    assert np.abs(np.asarray(image, dtype=int) - expected[0].permute(1, 2, 0).numpy()).max() <= 1
    before = tiny.actual["weights"]
    save_file(dict(randomize(encoder, seed=3).state_dict()), root / "x_encoder.safetensors")
    again = Pipeline.load(
        toy, device="cpu", dtype="fp32", taesd=root / "x_decoder.safetensors", taesd_decode=True
    )  # fmt: skip
    assert again.actual["weights"] != before


def test_it_is_repeated(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", toy, "--dtype", "fp32", "--taesd", toy.parent / "taesd.safetensors", "--taesd-decode")
    assert run(capsys, "a horse", *options, "--out", tmp_path / "x.png").code == 0
    assert settings_of_picture(tmp_path / "x.png")[0]["taesd_decode"] is True
    ran = run(capsys, "--from-png", tmp_path / "x.png", "--out", tmp_path / "y.png")
    assert (ran.code, len(ran.errors)) == (0, 1)
    with Image.open(tmp_path / "x.png") as first, Image.open(tmp_path / "y.png") as again:
        assert np.array_equal(first, again)


MISTAKES = {
    "--taesd-decode": "taesd_decode is True: expected with it --taesd FILE",
    "--taesd none": "none: no such file",
    "--taesd toy/vae": "no TAESD; expected TAESD3",
    "--preview 0": "preview is 0: expected a whole number from 1",
    "--preview 100001": "preview is 100001: expected at most 100000",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(toy.parent)
    ran = run(capsys, "a horse", "--model", toy, "--out", tmp_path / "out", *options.split())
    assert (ran.code, len(ran.errors)) == (2, 1) and MISTAKES[options] in ran.errors[0]
    assert list(tmp_path.iterdir()) == []
