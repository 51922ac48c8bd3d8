"""Pictures and dumps onto the disk: named, with their settings inside, whole or not at all."""

import hashlib
import itertools
import json
import os
import re
import tempfile
import time
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self, overload

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from mmdit.common.errors import SettingsError
from mmdit.common.files import beside, put, put_new
from mmdit.common.jsons import parse_json
from mmdit.common.paths import user_path
from mmdit.driver.options import OF_THE_COMMAND
from mmdit.driver.pictures import result_size
from mmdit.driver.settings import Settings, identity
from samplers.options import SAMPLERS, SPACINGS

EXIF, COMMENT, NOTE = 0x8769, 0x9286, 0x927C  # tags of EXIF 2.32, section 4.6: UserComment, MakerNote
MAKER = b"mmdit\0"  # begins the note

_END = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG file
_BEHIND = 16  # pictures that may wait to be written
_TRIES, _PAUSE = 20, 0.1  # for a file that is still empty, where the file system knows no links; seconds
_SHEET = ".attention.png"  # a sheet's name after its picture's
_NAME = 120  # bytes of a name that come from the prompt


class UnwritableError(SettingsError):
    """The disk does not take a file."""


@overload
def save_image(image: Image.Image, settings: Settings, path: Path) -> Path: ...
@overload
def save_image(image: Image.Image, settings: Settings, path: Path, once: bool) -> Path | None: ...


def save_image(image: Image.Image, settings: Settings, path: Path, once: bool = False) -> Path | None:
    """Write one picture with its own settings inside; returns the file. UnwritableError where the disk refuses it.

    Where `settings.out` names a file, that is `path`, and is replaced if it is there. In a folder `path` is the first
    name to try: what is there is never replaced, not even if it came there a moment ago. once: nor is the same picture
    written again that another process put there; then None is returned.
    """
    info = png_info(settings)
    with _written(path) as written:
        image.save(written, format="PNG", pnginfo=info)
        if is_file(settings.out):
            put(written, path)
            return path
        for name in itertools.chain([path], names(settings)):
            if put_new(written, name):
                return name
            if once and _shows(name, settings):
                return None
        raise AssertionError("names have no end")


def is_there(settings: Settings, path: Path) -> bool:
    """Whether a picture is in its file or, in a folder, under another of its names: on the disk, now."""
    if is_file(settings.out):
        return _shows(path, settings)
    return any(_shows(name, settings) for name in (path, *itertools.takewhile(os.path.lexists, names(settings))))


def _shows(path: Path, settings: Settings) -> bool:
    """Whether a file is this picture. One that is empty is waited for: another process may just be writing it."""
    for _ in range(_TRIES):
        try:
            if path.stat().st_size:
                break
        except OSError:
            return False
        time.sleep(_PAUSE)
    found = settings_in(path)
    return found is not None and identity(found) == identity(settings)


def png_info(settings: Settings) -> PngImagePlugin.PngInfo:
    """What a picture's file says of how it was drawn."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters(settings))
    info.add_text("mmdit", as_json(settings))
    return info


def exif_info(settings: Settings, most: int) -> bytes:
    """The same for a JPEG or WebP, as EXIF: `parameters` as its comment, all settings as JSON in its maker's note.

    most: bytes that the file has room for; what does not fit is left out, the note first.
    """
    comment = b"UNICODE\0" + parameters(settings).encode("utf-16-be", "replace")
    note = MAKER + as_json(settings).encode(errors="replace")
    for own in ({COMMENT: comment, NOTE: note}, {COMMENT: comment}):
        exif = Image.Exif()
        exif.get_ifd(EXIF).update(own)
        if len(data := exif.tobytes()) <= most:
            return data
    return b""


def as_json(settings: Settings) -> str:
    """All settings, as JSON."""
    return json.dumps(asdict(settings), ensure_ascii=False)


def save_dump(write: Callable[[Path], object], path: Path) -> None:
    """Write a file by a function of its path, in the place of what is there; UnwritableError as above."""
    with _written(path) as written:
        write(written)
        put(written, path)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with beside(path) as written:
            yield written
    except (OSError, SafetensorError) as error:
        raise UnwritableError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def settings_in(path: Path) -> Settings | None:
    """What a picture was drawn by; None where the file is no picture of this program, or not a whole one."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is looked at
            with Image.open(path) as image:
                settings = Settings(**parse_json(image.info["mmdit"]))
        settings.check()
        return settings
    except (OSError, ValueError, LookupError, TypeError, Image.DecompressionBombError):
        return None


class Saver:
    """Writes pictures in a thread of its own, while others are drawn; used as a context, whose end waits for all.

    waited: seconds that pictures had to wait to be taken, and the end for the last to be written.
    """

    def __init__(self, written: Callable[[Path], object], once: bool = False) -> None:
        """written: called, in the thread, with the path of each picture once it is there. once: as in `save_image`."""
        self.waited, self._written, self._once = 0.0, written, once
        self._thread, self._jobs = ThreadPoolExecutor(1, thread_name_prefix="save"), deque[Future[None]]()

    def __call__(
        self, image: Image.Image, settings: Settings, path: Path, sheet: Callable[[], Image.Image] | None = None
    ) -> None:
        """Have it written; where the thread is far behind, wait. Raises what went wrong with an earlier one.

        sheet: makes a picture that goes beside it, as NAME.attention.png, in the place of what is there.
        """
        self._wait(most=_BEHIND)
        self._jobs.append(self._thread.submit(self._save, image, settings, path, sheet))

    def _save(
        self, image: Image.Image, settings: Settings, path: Path, sheet: Callable[[], Image.Image] | None
    ) -> None:  # fmt: skip
        new = save_image(image, settings, path, self._once)
        if new is None:
            return
        self._written(path := new)
        if sheet is not None:
            save_dump(lambda written: sheet().save(written, format="PNG"), sheet_path(path))
            self._written(sheet_path(path))

    def _wait(self, most: int) -> None:
        start = time.perf_counter()
        while self._jobs and (len(self._jobs) > most or self._jobs[0].done()):
            self._jobs.popleft().result()
        self.waited += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        # Pictures that are done are written also where drawing the next was broken off.
        try:
            if failed is None:
                self._wait(most=0)
        finally:
            self._thread.shutdown()


def is_file(out: str) -> bool:
    return out.lower().endswith(".png")


def picture_path(settings: Settings, index: int = 0, count: int = 1) -> Path:
    """Where picture `index` of `count` goes: `out`, or in it the first free name."""
    out = Path(settings.out).expanduser()
    if is_file(settings.out):
        return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
    return next(path for path in names(settings) if not path.exists())


def preview_path(path: Path) -> Path:
    """Where the previews of the picture that goes to this path are."""
    return path.with_name(f"{path.stem}.preview.png")


def sheet_path(path: Path) -> Path:
    """Where the sheet of the picture that goes to this path is."""
    return path.with_name(f"{path.stem}{_SHEET}")


def is_sheet(path: Path) -> bool:
    return path.name.endswith(_SHEET)


def check_beside(option: str, pictures: Iterable[Path], own: Iterable[Path], place: Callable[[Path], Path]) -> None:
    """Raise SettingsError where a file beside a picture cannot have its name, or would replace another picture.

    pictures: the paths of all that are to be drawn. own: of those that have such a file. place: where it is, of one of
    them. A file that another run left there is no picture of this program's.
    """
    every = {os.path.realpath(path) for path in pictures}
    for path in own:
        file = user_path(option, str(place(Path(os.path.realpath(path)))))
        if str(file) in every or file.is_dir() or settings_in(file) is not None:
            raise SettingsError(f"{option}: {file} would be replaced, a picture: give --out another name")


def names(settings: Settings) -> Iterator[Path]:
    """The names that a picture may have in its folder, best first, without end."""
    out, name = Path(settings.out).expanduser(), stem(settings)
    yield out / f"{name}.png"
    yield from (out / f"{name}-{again}.png" for again in itertools.count(2))


def stem(settings: Settings) -> str:
    """A file's name after prompt and seed: the letters and digits of any language, without their case."""
    text = unicodedata.normalize("NFC", settings.prompt.lower())
    # A mark is part of the letter that it follows.
    kept = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else "-" for c in text)
    words = re.sub("-+", "-", kept).strip("-").encode()[:_NAME].decode(errors="ignore").rstrip("-")
    if not words and text.strip():  # an emoji, for one
        words = f"picture-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{words or 'picture'}-{settings.seed}"


def parameters(settings: Settings) -> str:
    """The settings as the text that picture tools read from a PNG's `parameters` chunk.

    Prompt, negative prompt, then one line of `name: value` pairs (the form that AUTOMATIC1111's web UI introduced):
    first the names those tools know, then all other settings that are not at their default, under their own.
    """
    known = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.sampler],
        **({} if settings.sigmas else {"Schedule type": SPACINGS[settings.schedule]}),
        "CFG scale": settings.cfg,
        "Seed": settings.seed,
        "Size": "{}x{}".format(*result_size(settings)),
        "Model": Path(settings.model).name if settings.model else "demo",
    }
    told = {"prompt", "negative", "sampler", "schedule", "steps", "cfg", "seed", "width", "height", "model", "count"}
    told |= {*OF_THE_COMMAND}
    plain = type(settings)()
    own = {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != getattr(plain, f.name)}
    own = {name: value for name, value in own.items() if name not in told}
    pairs = ", ".join(f"{name}: {quoted(value)}" for name, value in {**known, **own, "Version": engine()}.items())
    negative = f"\nNegative prompt: {settings.negative}" if settings.negative else ""
    return f"{settings.prompt}{negative}\n{pairs}"


def quoted(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def engine() -> str:
    try:
        return f"mmdit {version('mmdit')}"
    except PackageNotFoundError:
        return "mmdit"


def check_writable(settings: Settings) -> None:
    """Raise SettingsError, before any work is done, where `out` or `dump` cannot be written."""
    targets = {"out": user_path("out", settings.out)}
    if settings.dump is not None:
        if not settings.dump.endswith(".safetensors"):
            raise SettingsError(f"dump is {settings.dump!r}: expected a name ending in .safetensors")
        targets["dump"] = user_path("dump", settings.dump)
    for name, path in targets.items():
        file = name == "dump" or is_file(settings.out)
        if file and path.is_dir():
            raise SettingsError(f"{name}: {path} is a folder, expected a file's name")
        check_folder(name, path.parent if file else path)


def check_folder(name: str, folder: Path) -> None:
    """Try to write into a folder, or where it is going to be made, leaving no trace; SettingsError."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingsError(f"{name}: cannot write into {folder}: {error.strerror or error}") from None
