"""What a picture's file says of how it was drawn, as settings of this program.

Its own pictures say all (the chunk `mmdit`, or in JPEG and WebP the maker's note). AUTOMATIC1111's web UI and its
relatives, and ComfyUI, say what they say; of that comes what exists here. Only a file's head is read, never a pixel.
"""

import struct
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mmdit.common.errors import SettingsError
from mmdit.common.jsons import parse_json
from mmdit.common.paths import user_path
from mmdit.driver.comfyui import read_graph, read_workflow
from mmdit.driver.foreign import Reading
from mmdit.driver.likeness import filled
from mmdit.driver.options import OF_THE_COMMAND
from mmdit.driver.output import COMMENT, EXIF, MAKER, NOTE
from mmdit.driver.settings import Settings
from mmdit.driver.webui import read_parameters

_PIXELS = 2**27  # of a picture that this program draws there are fewer, in any model
_TEXT = {b"UNICODE\0": "utf-16", b"ASCII\0\0\0": "utf-8", b"\0" * 8: "utf-8"}


def without_levels(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, but for noise levels where what is given says them in another way."""
    ways = ({"sigmas"}, {"steps", "schedule", "shift"})
    others = {name for way, other in (ways, ways[::-1]) if given.keys() & way for name in other}
    return {name: value for name, value in found.items() if name not in others - given.keys()}


def settings_of_picture(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The settings that a picture was drawn by, and in words what of them does not exist here.

    Of this program's own pictures all that concern the picture, among them `weights`, and none of where it went. From
    a PNG's texts, else from the EXIF of any format. Raises SettingsError for a file that is no picture, says
    nothing of the kind, has values that cannot be, or claims to be larger than any picture drawn.
    """
    where = user_path("from_png", str(path))
    texts = _texts(where)
    own = _own(where, texts["mmdit"]) if "mmdit" in texts else None
    found = own or _foreign(texts)
    if found is None:
        raise SettingsError(
            f"{path}: says nothing of how it was drawn: expected a picture of this program, of AUTOMATIC1111's web UI "
            "or of ComfyUI, as they wrote it"
        )
    try:
        settings = filled(found.settings)
        Settings(**settings).resolved({})
    except (SettingsError, TypeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings, found.left_out


def settings_of_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """Settings that the texts in a picture's head name, as `settings_of_picture` finds them; none where there are none.

    Raises SettingsError where this program's own are damaged.
    """
    found = _own(Path("the picture"), texts["mmdit"]) if "mmdit" in texts else _foreign(texts)
    return {} if found is None else found.settings


def _texts(path: Path) -> dict[str, str]:
    """The texts in a picture's head by their names, the EXIF comment as `comment`; SettingsError."""
    if not path.is_file():
        raise SettingsError(f"from_png: {path}: {'not a regular file' if path.exists() else 'no such file'}")
    return texts_in(path, str(path))


def texts_in(file: Path | BinaryIO, path: str) -> dict[str, str]:
    """The same of a file that is open; path: what it is called in messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it skips; no pixel is looked at
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > _PIXELS:
                    raise SettingsError(
                        f"{path}: claims {image.width}x{image.height} pixels: no picture drawn has so many"
                    )
                texts = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
                exif = image.getexif().get_ifd(EXIF) if "exif" in image.info else {}
    except SettingsError:
        raise
    except Image.DecompressionBombError:
        raise SettingsError(f"{path}: claims more pixels than any picture drawn has") from None
    except (OSError, ValueError, LookupError, TypeError, SyntaxError, OverflowError, struct.error) as error:
        raise SettingsError(f"{path}: no PNG, JPEG or WebP that can be read: {error}") from None
    comment, note = exif.get(COMMENT), exif.get(NOTE)
    found = {"comment": _comment(comment)} if isinstance(comment, bytes) else {}
    if isinstance(note, bytes) and note.startswith(MAKER):
        found["mmdit"] = note[len(MAKER) :].decode(errors="replace")
    return {**found, **texts}


def _comment(value: bytes) -> str:
    """The text of an EXIF comment, which names its encoding in eight bytes (EXIF 2.32, table 9)."""
    encoding = _TEXT.get(value[:8])
    body = value[8:] if encoding else value
    if encoding == "utf-16" and body[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        # The web UI writes big-endian; others do not. Text is mostly of letters whose higher byte is 0.
        encoding = "utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le"
    return body.decode(encoding or "utf-8", errors="replace").strip("\0 ")


def _own(path: Path, text: str) -> Reading:
    """What this program wrote."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise SettingsError(f"{path}: its settings are not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise SettingsError(f"{path}: its settings are no JSON object")
    found, known = Reading(), {f.name: f for f in fields(Settings)}
    for name, each in value.items():
        if name in OF_THE_COMMAND:
            continue
        if name not in known:
            found.leave(f"{name} {each!r}"[:80])
        else:
            several = isinstance(known[name].default, tuple) and isinstance(each, list)
            found.settings[name] = tuple(each) if several else each
    return found


def _foreign(texts: Mapping[str, str]) -> Reading | None:
    """What another program wrote, if that can be read."""
    for name in ("parameters", "comment"):
        if name in texts and (found := read_parameters(texts[name])):
            return found
    for name, read in (("prompt", read_graph), ("workflow", read_workflow)):
        try:
            found = read(parse_json(texts[name])) if name in texts else None
        except ValueError:
            continue  # no JSON, or none that the other programs write
        if found is not None:
            return found
    return None
