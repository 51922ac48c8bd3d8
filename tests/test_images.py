"""Pictures as input: read safely, whatever they are; what Python gives; options."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmdit.common.errors import SettingsError
from mmdit.images import read
from mmdit.images.given import Given
from mmdit.images.options import ImageOptions, as_text, margins_of
from mmdit.images.read import look, read_mask, read_picture

DRAW = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(DRAW.integers(0, 256, (3, 4, 3), np.uint8)).resize((40, 24)))  # (24, 40, 3)


def saved(folder: Path, image: Image.Image, name: str, **more: Any) -> str:
    image.save(folder / name, **more)
    return str(folder / name)


def pixels(given: str) -> np.ndarray:
    image = read_picture("init", given)
    assert image.mode == "RGB"
    return np.asarray(image, int)


def refused(given: str) -> str:
    with pytest.raises(SettingsError) as told:
        read_picture("init", given)
    message = str(told.value)
    assert message.startswith(f"init: {given}: ") and message.isprintable()
    with pytest.raises(SettingsError):
        look("init", given)
    return message.removeprefix(f"init: {given}: ")


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "more", "off"), [
    ("a.png", {}, 0), ("a.jpg", {"quality": 98, "subsampling": 0}, 6), ("a.webp", {"lossless": True}, 0),
    ("b.webp", {"quality": 95}, 25), ("misnamed.txt", {"format": "PNG"}, 0),
])  # fmt: skip
def test_each_kind_is_told_by_its_content(tmp_path: Path, name: str, more: dict, off: int) -> None:
    given = saved(tmp_path, Image.fromarray(SMOOTH), name, **more)
    assert np.abs(pixels(given) - SMOOTH).max() <= off
    seen = look("init", given)
    assert (seen.width, seen.height) == (40, 24)


ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # stored pixels of an upright picture, after EXIF's text:
    1: lambda x: x,
    2: lambda x: x[:, ::-1],  # row 0 is the top, column 0 the right-hand side
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),  # row 0 is the left-hand side, column 0 the top
    6: lambda x: x[::-1].transpose(1, 0, 2)[::-1, ::-1],  # row 0 is the right-hand side, column 0 the top
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[::-1].transpose(1, 0, 2),  # row 0 is the left-hand side, column 0 the bottom
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_pictures_are_upright(tmp_path: Path, orientation: int, name: str) -> None:
    """All eight orientations of EXIF; of a picture from Python too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 98, "subsampling": 0}}.get(name, {})
    stored = Image.fromarray(np.ascontiguousarray(ORIENTED[orientation](SMOOTH)))
    given = saved(tmp_path, stored, name, exif=exif, **more)
    assert np.abs(pixels(given) - SMOOTH).max() <= (6 if name == "a.jpg" else 0)
    assert look("init", given)[:2] == (40, 24)
    with Image.open(given) as image:
        assert np.abs(pixels(Given(image)) - SMOOTH).max() <= (6 if name == "a.jpg" else 0)
        assert look("init", Given(image))[:2] == (40, 24)


def test_orientations_are_each_another_way_to_store_it() -> None:
    assert len({ORIENTED[i](SMOOTH).tobytes() for i in ORIENTED}) == 8


def test_a_damaged_orientation_turns_nothing(tmp_path: Path) -> None:
    given = saved(tmp_path, Image.fromarray(SMOOTH), "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert np.array_equal(pixels(given), SMOOTH)


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    """v / 257 to the nearest, in both orders of bytes; 65535 is white, and no value overflows."""
    grey = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    expected = np.round(grey / 257).astype(int)
    given = saved(tmp_path, Image.fromarray(grey), "a.png")
    assert np.array_equal(pixels(given)[..., 1], expected)
    for mode, order in (("I;16", "<"), ("I;16B", ">")):
        image = Image.frombytes(mode, (9, 1), grey.astype(f"{order}u2").tobytes())
        assert np.array_equal(pixels(Given(image))[..., 0], expected)
    assert np.array_equal(pixels(Given(Image.fromarray(grey.astype(np.int32), mode="I")))[..., 2], expected)


def test_wide_numbers_of_eight_bits_are_taken_for_these() -> None:
    """A mask from Python whose numbers go to 255 is not a black one of 16 bits."""
    grey = np.array([[0, 1, 128, 255]], np.int32)
    assert np.array_equal(pixels(Given(Image.fromarray(grey, mode="I")))[..., 0], grey)


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_sixteen_bits_of_colour(tmp_path: Path) -> None:
    """Written by hand, since Pillow writes none: of each channel the upper 8 bits, at most a level away."""
    (tmp_path / "a.png").write_bytes(
        png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">6H", 65535, 0, 257, 300, 65000, 32768))
    )
    assert np.abs(pixels(str(tmp_path / "a.png")) - [[[255, 0, 1], [1, 253, 128]]]).max() <= 1


def test_cmyk_and_grey(tmp_path: Path) -> None:
    """CMYK as Pillow converts it, (1 - C)(1 - K) and so on; a JPEG of it is near to that."""
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 51))
    for given in (saved(tmp_path, flat, "a.jpg", quality=98), Given(flat)):
        assert np.abs(pixels(given) - [0, 204, 204]).max() <= 3
    for mode, colour in (("L", 77), ("1", 1), ("YCbCr", (77, 128, 128)), ("F", 77.0)):
        expected = 255 if mode == "1" else 77
        assert np.abs(pixels(Given(Image.new(mode, (3, 2), colour))) - expected).max() <= 1
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(SMOOTH).convert("L"), "l.png"))[..., 0],
                          np.asarray(Image.fromarray(SMOOTH).convert("L")))  # fmt: skip


def test_what_is_transparent_is_white_and_of_a_mask_black(tmp_path: Path) -> None:
    """a colour + (1 - a) background, of RGBA, grey with alpha, a palette, a transparent colour, and WebP."""
    clear, half = Image.new("RGBA", (2, 1), (200, 100, 0, 0)), Image.new("RGBA", (2, 1), (200, 100, 0, 51))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 100, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    for image, name, more, expected in (
        (clear, "a.png", {}, [[255, 255, 255]] * 2),
        (clear, "a.webp", {"lossless": True, "exact": True}, [[255, 255, 255]] * 2),
        (half, "b.png", {}, [[244, 224, 204]] * 2),
        (half.convert("LA"), "c.png", {}, [[228, 228, 228]] * 2),
        (palette, "d.png", {"transparency": 0}, [[255, 255, 255], [10, 20, 30]]),
        (palette, "e.png", {"transparency": b"\x33\xff"}, [[244, 224, 204], [10, 20, 30]]),
        (palette, "f.png", {}, [[200, 100, 0], [10, 20, 30]]),
        (half.convert("RGB"), "g.png", {"transparency": (200, 100, 0)}, [[255, 255, 255]] * 2),
    ):
        assert np.abs(pixels(saved(tmp_path, image, name, **more)) - [expected]).max() <= 1, name
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    assert np.array_equal(np.asarray(read_mask("mask", saved(tmp_path, mask, "m.png"))), [[0, 255]])


def test_of_an_animation_the_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for name, more in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"format": "MPO"})):
        given = saved(tmp_path, first, name, save_all=True, append_images=[second], **more)
        assert np.abs(pixels(given) - [255, 0, 0]).max() <= (3 if name == "a.jpg" else 0), name


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for name, data in (("text.png", b"hello"), ("empty.png", b""), ("bmp.png", None), ("gif.png", None)):
        if data is None:
            Image.new("RGB", (4, 4)).save(tmp_path / name, format=name[:3])
        else:
            (tmp_path / name).write_bytes(data)
        assert refused(str(tmp_path / name)) == "is no PNG, JPEG or WebP, or is damaged"
    assert refused(str(tmp_path / "none.png")) == "No such file or directory"
    assert refused(str(tmp_path)) == "is no file"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_damaged_files_are_refused_or_read(tmp_path: Path, name: str) -> None:
    """Cut off anywhere, or with bytes changed: one line, or a picture."""
    whole = Path(saved(tmp_path, Image.fromarray(DRAW.integers(0, 256, (24, 40, 3), np.uint8)), name)).read_bytes()
    refusals, path = list[str](), tmp_path / "damaged"
    for at in range(0, len(whole) * 9 // 10, len(whole) // 40):
        path.write_bytes(whole[:at])
        refused(str(path))
        changed = bytearray(whole)
        changed[at : at + 3] = DRAW.bytes(3)
        path.write_bytes(changed)
        try:
            pixels(str(path))
        except SettingsError as error:
            refusals.append(str(error))
    assert refusals and all(told.startswith("init: ") and told.isprintable() for told in refusals)


def test_bombs_are_refused_before_a_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that claim much; just above the limit too, which Pillow would let pass."""
    bombs = {
        "png": png(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"\0" * 100),
        "slim": png(struct.pack(">IIBBBBB", 8192, 8193, 8, 2, 0, 0, 0), b"\0" * 100),
    }
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, format="JPEG")
    at = jpeg.getvalue().index(b"\xff\xc0")
    bombs["jpeg"] = jpeg.getvalue()[: at + 5] + struct.pack(">HH", 60000, 60000) + jpeg.getvalue()[at + 9 :]
    large = (59999).to_bytes(3, "little")
    bombs["vp8x"] = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + 2 * large
    bombs["vp8l"] = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<IBI", 10, 0x2F, 2**28 - 1) + b"\0" * 5
    frame = b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"
    bombs["vp8 "] = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8 " + struct.pack("<I", 10) + frame
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were decoded"))
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
        if name.startswith("vp8"):  # Pillow decodes these as it opens them
            monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
        assert "pixels" in refused(str(tmp_path / name)), name


def test_claimed_sizes_are_those_of_pillow(tmp_path: Path) -> None:
    for name, image, more in (
        ("lossy", Image.new("RGB", (37, 300)), {}),
        ("lossless", Image.new("RGB", (300, 37)), {"lossless": True}),
        ("alpha", Image.new("RGBA", (300, 37), (1, 2, 3, 4)), {}),
    ):
        data = Path(saved(tmp_path, image, name, format="WEBP", **more)).read_bytes()
        as_png = Path(saved(tmp_path, image, name, format="PNG")).read_bytes()
        assert read._claimed_size(as_png) == image.size
        assert read._claimed_size(data) == image.size


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = saved(tmp_path, Image.fromarray(SMOOTH), "a.png")
    monkeypatch.setattr(read, "MOST_BYTES", 1 << 20)
    with Path(given).open("r+b") as file:
        file.truncate((1 << 20) + 1)
    assert refused(given) == "is larger than 1 MiB"


# ---- pictures from Python ------------------------------------------------------------------------


def test_a_given_picture_is_a_text_of_its_content() -> None:
    image = Image.fromarray(SMOOTH)
    given = as_text("init", image)
    assert isinstance(given, str) and given == as_text("init", image.copy()) and given.startswith("picture-")
    image.putpixel((0, 0), (1, 2, 3))
    assert as_text("init", image) != given and np.array_equal(pixels(given), SMOOTH)
    assert look("init", given).content == given.removeprefix("picture-")
    assert tuple(as_text("init", value) for value in (None, "a", Path("a"), 7)) == (None, "a", "a", 7)


def test_a_given_picture_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads late: what is damaged shows when it is given."""
    path = Path(saved(tmp_path, Image.fromarray(DRAW.integers(0, 256, (24, 40, 3), np.uint8)), "a.png"))
    path.write_bytes(path.read_bytes()[:1000])
    with Image.open(path) as image, pytest.raises(SettingsError, match=r"^mask: .*a.png: is damaged"):
        as_text("mask", image)
    monkeypatch.setattr(read, "MOST_PIXELS", 100)
    with pytest.raises(SettingsError, match=r"^init: the picture: is 11x10: expected at most 100 pixels"):
        as_text("init", Image.new("L", (11, 10)))


def test_content_counts_and_not_the_place(tmp_path: Path) -> None:
    one, other = saved(tmp_path, Image.fromarray(SMOOTH), "a.png"), saved(tmp_path, Image.fromarray(SMOOTH), "b.png")
    assert look("init", one) == look("mask", other)
    saved(tmp_path, Image.fromarray(255 - SMOOTH), "b.png")
    assert look("init", one) != look("init", other)


# ---- options -------------------------------------------------------------------------------------


def test_margins() -> None:
    assert margins_of(None) == (0, 0, 0, 0) and margins_of("1, 2,3,40") == (1, 2, 3, 40)
    for text in ("1,2,3", "1,2,3,4,5", "0,0,0,0", "-1,0,0,0", "a,0,0,0", "", "9000,0,0,0", "1.5,0,0,0"):
        with pytest.raises(SettingsError, match="outpaint is"):
            margins_of(text)


@pytest.mark.parametrize(("given", "message"), [
    ({"mask": "m.png"}, "mask is 'm.png', but init is not given"), ({"strength": 0.5}, "but init is not given"),
    ({"outpaint": "0,0,8,0"}, "but init is not given"), ({"init": "i", "mask_crop": 3}, "but mask is not given"),
    ({"init": "i", "mask_blur": 3}, "mask_blur is 3, but mask is not given"),
    ({"variation_seed": 3}, "but variation_strength is not given"),
    ({"variation_strength": 0.5}, "but variation_seed is not given"),
    ({"init": "i", "mask": "m", "mask_crop": 1, "outpaint": "0,0,8,0"}, "mask_crop is 1, but outpaint is given too"),
    ({"init": "i", "mask": "m", "upscale": 2.0}, "upscale is 2.0, but mask or outpaint is given too"),
])  # fmt: skip
def test_what_does_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ImageOptions(**given).check_together()
