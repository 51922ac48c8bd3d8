"""What goes back: pictures as files, and errors."""

import io
import re
from base64 import b64encode
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from PIL import Image

from mmdit.common.errors import SettingsError, one_line
from mmdit.common.options import Mark
from mmdit.common.paths import split_scale
from mmdit.driver.output import exif_info, png_info
from mmdit.driver.settings import Settings
from mmdit.driver.stages import NotFiniteError
from mmdit.memory.budget import DeviceMemoryError
from mmdit.serve.events import ClosedError, DiedError, FullError, LetGoError
from text_encoders import TokenizerError

FORMATS = ("png", "jpeg", "webp")
_MOST_EXIF = {"jpeg": 65_533, "webp": 10**7}  # bytes; a JPEG's segment has no more (ITU T.81, B.1.1.4)
GONE = 499  # for the log: the client left before there was an answer


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, one_line(message), code, param


@dataclass(frozen=True)
class Trouble:
    """An error as it is answered."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None  # seconds

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def trouble(error: Exception) -> Trouble:
    """What is answered for an exception; of one that should not be, nothing is told."""
    text = one_line(str(error))
    match error:
        case RefusedError():
            return Trouble(error.status, error.message, error.code, error.param)
        case SettingsError() | TokenizerError():
            unknown = re.match(r"no setting '(\w+)'", text)
            name = unknown[1] if unknown else text.split(" ")[0].rstrip(":")
            known = unknown or name in {f.name for f in fields(Settings)}
            return Trouble(400, text, "invalid_value", name if known else None)
        case FullError():
            return Trouble(429, f"{text}: try again in {error.seconds} s", "queue_full", None, error.seconds)
        case ClosedError():
            return Trouble(503, text, "unavailable", None, 5)
        case DeviceMemoryError():
            return Trouble(503, text, "out_of_memory", None, 30)
        case NotFiniteError():
            return Trouble(500, text, "not_finite")
        case DiedError():
            return Trouble(500, text, "worker_died")
        case LetGoError():
            return Trouble(GONE, text, "cancelled")
        case TimeoutError():
            return Trouble(504, "it took longer than this server allows; the pictures were let go", "timeout")
    return Trouble(500, "the server failed; its log says how", "internal")


def file_of(image: Image.Image, settings: Settings | None, form: str = "png", quality: int = 100) -> bytes:
    """A picture's file in one of FORMATS, with the settings inside, none of which names a path of this machine."""
    data = io.BytesIO()
    more: dict[str, Any] = {}
    told = None if settings is None else without_paths(settings)
    if form == "png":
        more = {"compress_level": 1} | ({} if told is None else {"pnginfo": png_info(told), "compress_level": 6})
    else:
        more = {"quality": quality} if form == "jpeg" or quality < 100 else {"lossless": True}
        if told is not None:
            more["exif"] = exif_info(told, _MOST_EXIF[form])
    image.save(data, format=form.upper(), **more)
    return data.getvalue()


def base64_of(image: Image.Image, settings: Settings | None, form: str = "png", quality: int = 100) -> str:
    return b64encode(file_of(image, settings, form, quality)).decode()


def without_paths(settings: Settings) -> Settings:
    """With files by their names alone."""
    names = [f.name for f in fields(settings) if Mark.PATH in f.metadata["marks"]]
    plain = {name: _named(getattr(settings, name)) for name in names}
    return replace(settings, **plain, out=type(settings)().out)


def _named(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(value, tuple):
        return tuple(str(_named(each)) for each in value)
    if value is None:
        return None
    path, scale = split_scale(value)
    return PurePath(path).name + (f":{scale:g}" if scale != 1 else "")


def model_name(settings: Settings) -> str:
    """What the model is called."""
    return "demo" if settings.model is None else PurePath(settings.model).name
