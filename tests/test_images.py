"""Pictures as input: read safely whatever they are, fitted, masked, cut out and put back."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageFilter

from mmdit.common.errors import SettingsError
from mmdit.images import read
from mmdit.images.given import Given, as_text
from mmdit.images.masks import blurred, cells, new_margins, values
from mmdit.images.options import ImageOptions, margins_of
from mmdit.images.read import look, read_mask, read_picture
from mmdit.images.shape import (
    Box,
    Margins,
    area_size,
    completed,
    extended,
    fitted,
    other_side,
    own_size,
    put_back,
    region,
    whole,
)  # fmt: skip

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


# ---- sizes ---------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    assert own_size((1000, 700), 1024**2) == (1000, 700)
    assert own_size((4000, 3000), 1024**2) == (1182, 887)
    assert own_size((1, 2**24), 1024**2) == (1, 4194304)
    assert whole((1000, 704), 16) == (1008, 704)
    assert area_size((300, 100), 1024**2, 16) == (1776, 592)
    assert other_side(512, 1000, 700, 16) == 352  # of 358.4
    assert other_side(16, 1000, 1, 16) == 16


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 96), (40, 24), (16, 16)])
def test_fitting(size: tuple[int, int]) -> None:
    """On a picture whose colour is its place, so that one sees which part of it is where."""
    x, y = np.meshgrid(np.arange(40) * 6, np.arange(24) * 6)
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    wide, high = size
    for fit in ("crop", "pad", "stretch"):
        assert fitted(image, size, fit).size == size
    assert fitted(image, image.size, "crop") is image
    stretched = np.asarray(fitted(image, size, "stretch"), float)
    middle = [(40 / 2 - 0.5) * 6, (24 / 2 - 0.5) * 6]
    for fit in ("crop", "pad", "stretch"):  # the middle stays the middle
        found = np.asarray(fitted(image, size, fit), float)[..., :2]
        assert (
            np.abs(found[high // 2 - 1 : high // 2 + 1, wide // 2 - 1 : wide // 2 + 1].mean((0, 1)) - middle).max() < 5
        )
    assert stretched[..., 0].min() < 12 and stretched[..., 0].max() > 222
    cropped, padded = (np.asarray(fitted(image, size, fit), float) for fit in ("crop", "pad"))
    slope = 6 / max(wide / 40, high / 24)  # levels from pixel to pixel
    if wide >= 32:
        assert np.diff(cropped[high // 2, 4:-4, 0]).mean() == pytest.approx(slope, abs=0.15)
    inner = min(wide / 40, high / 24)
    if wide / 40 > high / 24:
        bar = (wide - round(40 * inner)) // 2
        assert (padded[:, :bar] == padded[:, bar : bar + 1]).all()
    elif high / 24 > wide / 40:
        bar = (high - round(24 * inner)) // 2
        assert (padded[:bar] == padded[bar]).all()


def test_extended() -> None:
    """A picture's edge is repeated, a mask's surroundings are black."""
    image, mask = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[..., 0])
    margins = Margins(3, 0, 5, 2)
    found = np.asarray(extended(image, margins))
    assert found.shape == (26, 48, 3) and np.array_equal(found[:24, 3:43], SMOOTH)
    assert (found[:24, :3] == SMOOTH[:, :1]).all() and (found[24:, 43:] == SMOOTH[-1, -1]).all()
    assert np.asarray(extended(mask, margins)).sum() == np.asarray(mask).sum()
    found = np.asarray(completed(mask, (43, 26)))
    assert np.array_equal(found[:24, :40], np.asarray(mask)) and (found[:, 40:] == found[:, 39:40]).all()
    assert (found[24:] == found[23]).all() and completed(image, (43, 26)).size == (43, 26)
    new = np.asarray(new_margins((40, 24), margins))
    assert new.shape == (26, 48) and (new[:24, 3:43] == 0).all() and (new == 255).sum() == 26 * 48 - 24 * 40


def masked(box: tuple[int, int, int, int], size: tuple[int, int] = (100, 60)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(200, box)
    return mask


@pytest.mark.parametrize(("box", "margin", "size", "expected"), [
    ((40, 20, 60, 30), 0, None, (40, 20, 60, 30)), ((40, 20, 60, 30), 5, None, (35, 15, 65, 35)),
    ((0, 50, 9, 60), 5, None, (0, 45, 14, 60)), ((40, 20, 60, 30), 0, (64, 64), (40, 15, 60, 35)),
    ((0, 20, 10, 50), 0, (64, 64), (0, 20, 30, 50)), ((95, 0, 100, 40), 0, (64, 32), (20, 0, 100, 40)),
    ((10, 0, 90, 60), 0, (64, 64), (10, 0, 90, 60)), ((10, 10, 90, 20), 0, (64, 64), (10, 0, 90, 60)),
])  # fmt: skip
def test_regions(box: Any, margin: int, size: Any, expected: Any) -> None:
    """With a margin, within the picture, and of the shape that is drawn as far as there is room."""
    assert region(masked(box), margin, size) == expected


def test_a_black_mask_has_no_region() -> None:
    assert region(Image.new("L", (8, 8)), 3) is None


def test_what_is_put_back_is_exact() -> None:
    """Where the mask is black every bit is the original's; elsewhere what was drawn, brought to the box's size."""
    original = Image.fromarray(DRAW.integers(0, 256, (60, 100, 3), np.uint8))
    mask, box = masked((40, 20, 60, 30)), Box(30, 15, 70, 35)
    drawn = Image.new("RGB", (64, 32), (1, 2, 3))
    found, inside = np.asarray(put_back(original, drawn, mask, box)), np.asarray(mask) > 0
    assert np.array_equal(found[~inside], np.asarray(original)[~inside]) and (found[inside] == [1, 2, 3]).all()
    other = Image.fromarray(DRAW.integers(0, 256, (60, 100, 3), np.uint8))
    found = np.asarray(put_back(original, other, mask))
    assert np.array_equal(found[inside], np.asarray(other)[inside])


# ---- masks ---------------------------------------------------------------------------------------


def test_masks_as_numbers() -> None:
    mask = Image.fromarray(np.array([[0, 51, 102, 255]], np.uint8))
    assert values(mask).dtype == np.float32 and values(mask).tolist() == [[0.0, np.float32(0.2), np.float32(0.4), 1.0]]
    grid = np.zeros((16, 24), np.float32)
    grid[7, 8], grid[15, 23], grid[0, 23] = 1.0, 0.25, 0.5
    assert cells(grid, 8).tolist() == [[0, 1, 0.5], [0, 0, 0.25]]


def test_blur_is_that_of_pillow_and_leaves_black_what_is_far() -> None:
    mask = masked((40, 20, 60, 30))
    assert blurred(mask, 0) is mask
    found = np.asarray(blurred(mask, 3))
    assert np.array_equal(found, np.asarray(mask.filter(ImageFilter.GaussianBlur(3))))
    assert 0 < found[25, 39] < 200 and found[:, :20].sum() == 0


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
