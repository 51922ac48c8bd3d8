"""Pictures that users give, read safely: by what they hold, within limits, upright, in 8 bits a channel.

Whoever made the file is not trusted: its kind is told by its content, its size is looked at before any pixel is
decoded, and whatever its decoder stumbles over is a SettingsError.
"""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from mmdit.common.errors import SettingsError
from mmdit.common.paths import user_path
from mmdit.images.given import Given

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 2**26  # 8192x8192: a quarter of a gigabyte in 8-bit RGBA
MOST_BYTES = 2**28  # of a file
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

# What undoes EXIF's orientation (JEITA CP-3451, tag 0x0112): where the first row and column of the pixels belong.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
# What Pillow raises for damaged files, by experience.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


class Seen(NamedTuple):
    """What tells pictures apart."""

    width: int
    height: int
    content: str  # a hash of what it holds, wherever it lies


def read_picture(name: str, given: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """The picture that a setting of this name gives, RGB in 8 bits, upright.

    given: a path, or a `Given`. background: what lies behind transparent pixels. Of an animation it is the first
    picture. Numbers of 16 bits are rounded to 8. Raises SettingsError for what cannot be read, is none of FORMATS, is
    damaged, or has more than MOST_PIXELS.
    """
    image = _plain(_decoded(name, given))
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def read_mask(name: str, given: str) -> Image.Image:
    """A mask, "L" in 8 bits, upright: the brightness of the picture; what is transparent is black. Raises as above."""
    return read_picture(name, given, BLACK).convert("L")


def look(name: str, given: str) -> Seen:
    """Size and content of a picture, having read all of it; raises as `read_picture` does."""
    if isinstance(given, Given):
        image = _decoded(name, given)
        return Seen(*_size_upright(image), given.content)
    path = user_path(name, given)
    try:
        stat = path.stat()
    except OSError as error:
        raise SettingsError(f"{name}: {given}: {error.strerror or error}") from None
    return _look(name, given, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1000)
def _look(name: str, given: str, *_: int) -> Seen:
    data = _bytes(name, given)
    image = _open(name, given, data)
    return Seen(*_size_upright(image), hashlib.sha256(data).hexdigest()[:16])


def _decoded(name: str, given: str) -> Image.Image:
    """With its pixels, in whatever mode and direction they are stored."""
    if isinstance(given, Given):
        return given.image
    return _open(name, given, _bytes(name, given))


def picture_in(name: str, data: bytes, most: int | None = None) -> Image.Image:
    """The picture that a file holds, as it is stored, with its pixels; raises as `read_picture` does.

    most: pixels that it may claim to have, if not MOST_PIXELS; looked at before any is decoded.
    """
    return _open(name, "the picture", data, most)


def check_image(name: str, image: Image.Image) -> None:
    """Raise SettingsError for a picture of Python's that is too large or cannot be read."""
    what = getattr(image, "filename", "") or "the picture"
    _check_size(name, what, *image.size)
    with _told(name, what):
        image.load()


def _bytes(name: str, given: str) -> bytes:
    path = user_path(name, given)
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"{name}: {given}: is no file")
        if path.stat().st_size > MOST_BYTES:
            raise SettingsError(f"{name}: {given}: is larger than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}: {given}: {error.strerror or error}") from None


def _open(name: str, given: str, data: bytes, most: int | None = None) -> Image.Image:
    if (size := _claimed_size(data)) is not None:  # Pillow makes room for all of a WebP as it opens it
        _check_size(name, given, *size, most)
    with _told(name, given):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(name, given, *image.size, most)
    with _told(name, given):
        image.load()
    return image


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _told(name: str, given: str) -> Iterator[None]:
    """Turn what Pillow raises into a SettingsError; its warnings are not for users."""
    try:
        with _quietly():
            yield
    except UnidentifiedImageError:
        raise SettingsError(f"{name}: {given}: is no PNG, JPEG or WebP, or is damaged") from None
    except Image.DecompressionBombError:
        raise SettingsError(f"{name}: {given}: has too many pixels: expected at most {MOST_PIXELS}") from None
    except MemoryError:
        raise SettingsError(f"{name}: {given}: there is not enough memory to read it") from None
    except _DAMAGE as error:
        said = " ".join(str(error).split())
        raise SettingsError(f"{name}: {given}: is damaged: {said:.100}") from None


def _check_size(name: str, given: str, width: int, height: int, most: int | None = None) -> None:
    most = MOST_PIXELS if most is None else most
    if width * height > most:
        raise SettingsError(f"{name}: {given}: is {width}x{height}: expected at most {most} pixels")
    if width * height == 0:
        raise SettingsError(f"{name}: {given}: has no pixels")


def _claimed_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a PNG or a WebP claims to have, None for other files.

    PNG (W3C), section 11.2.1; RFC 9649, sections 2.5 to 2.7.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunk, head = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _turn(image: Image.Image) -> Any:
    with suppress(*_DAMAGE), _quietly():  # a damaged note is no reason to refuse a picture
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 0))
    return None


def _size_upright(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = _turn(image) in (_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8])
    return (height, width) if turned else (width, height)


def _plain(image: Image.Image) -> Image.Image:
    """Upright, RGB, or where something is transparent RGBA."""
    turn = _turn(image)
    if image.mode.startswith("I"):  # 16 bits, in whatever order of bytes, in whatever number type
        import numpy as np

        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.format is None and wide.max(initial=0) <= 255:  # made in Python, of numbers as 8 bits have them
            wide = wide * 257
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    clear = image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info
    image = image.convert("RGBA" if clear else "RGB")
    return image if turn is None else image.transpose(turn)
